"""Does a GPU draw the CPU's pictures? nano under some policies, by the fast engine on the GPU and
by the plain model on the CPU, prompt by prompt.

    python benchmarks/devices.py --out benchmarks/results/nano-devices.json

Both are also compared with the CPU's unquantized FP32 pictures. Two roundings of one policy differ
from each other by about as much as either differs from the exact picture; what must agree between
the devices is how far they are from that.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from gpu import DEVICE, envelope
from quality_nano import PROMPTS, draw, psnr_db, requests_of
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

    exact = pictures("cpu", "plain", None, "float32")
    rows = []
    for name, policy, dtype in VARIANTS:
        fast = pictures(str(DEVICE), "fused", policy, dtype)
        plain = pictures("cpu", "plain", policy, dtype)
        row = {
            "policy": name,
            "dtype": dtype,
            "between_devices_db": summary(psnr_db(fast, plain)),
            "gpu_to_exact_db": summary(psnr_db(fast, exact)),
            "cpu_to_exact_db": summary(psnr_db(plain, exact)),
        }
        rows.append(row)
        print(
            {key: value if isinstance(value, str) else value["mean"] for key, value in row.items()}
        )
        facts = envelope() | {"prompts": given.prompts, "size": "256x256", "steps": 8}
        given.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(map(float, values)), "least": float(min(values))}


if __name__ == "__main__":
    main()
