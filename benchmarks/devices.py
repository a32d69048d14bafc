"""Does a GPU draw the CPU's pictures? nano under some policies, by the fast engine on the GPU and
by the plain model on the CPU, prompt by prompt.

    python benchmarks/devices.py --out benchmarks/results/nano-devices.json

Both are also compared with the CPU's unquantized FP32 pictures. Two roundings of one policy differ
from each other by about as much as either differs from the exact picture; what must agree between
the devices is how far they are from that.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpu import DEVICE, envelope, write_rows
from quality_nano import PROMPTS, SIZE, STEPS, draw, psnr_db, requests_of
from zimage_fp8.engine.loading import EngineOptions, load_pipeline
from zimage_fp8.model.calibration import read_prompts

POLICIES = ("online_fp8", "fp8-row", "online_int8-rot")
VARIANTS = (
    ("bf16_base", None, "float32"),
    ("bf16_base", None, "bfloat16"),
    *((policy, policy, "bfloat16") for policy in POLICIES),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    requests = requests_of(read_prompts(PROMPTS)[: given.prompts])

    def pictures(device: str, engine: str, policy: str | None, dtype: str) -> np.ndarray:
        options = EngineOptions(engine)
        return draw(
            load_pipeline("nano", options=options, policy=policy, dtype=dtype, device=device),
            requests,
        )

    def rows() -> Iterator[dict[str, object]]:
        exact = pictures("cpu", "plain", None, "float32")
        for name, policy, dtype in VARIANTS:
            fast = pictures(str(DEVICE), "fused", policy, dtype)
            plain = pictures("cpu", "plain", policy, dtype)
            pairs = {
                "between_devices_db": psnr_db(fast, plain),
                "gpu_to_exact_db": psnr_db(fast, exact),
                "cpu_to_exact_db": psnr_db(plain, exact),
            }
            print(name, dtype, {key: round(float(it.mean()), 1) for key, it in pairs.items()})
            found = {key: summary(values) for key, values in pairs.items()}
            yield {"policy": name, "dtype": dtype, **found}

    facts = envelope() | {"prompts": given.prompts, "size": f"{SIZE}x{SIZE}", "steps": STEPS}
    write_rows(given.out, facts, "rows", rows())


def summary(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "least": float(values.min())}


if __name__ == "__main__":
    main()
