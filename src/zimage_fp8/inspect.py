"""VERB inspect: what a picture or a checkpoint says about itself."""

from pathlib import Path

from zimage_fp8.checkpoint.dialects import CONFIG_KEY, read_stored
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import COMPONENTS, linear_shapes, read_config
from zimage_fp8.model.source import check_pipeline_folder
from zimage_fp8.picture import read_metadata


def inspect(path: Path) -> dict[str, object]:
    """The metadata of a picture, or the facts of a pipeline folder. Reads headers only."""
    if path.is_file():
        return read_metadata(path)
    if path.is_dir():
        return inspect_folder(path)
    raise ZImageError(f"{path} does not exist", hint="give a PNG file or a pipeline folder")


def inspect_folder(folder: Path) -> dict[str, object]:
    check_pipeline_folder(folder)
    config, raw = read_config(folder / "transformer")
    linears = linear_shapes(config)
    stored = read_stored(raw, linears)
    with ShardReader(folder / "transformer") as reader:
        parameters = sum(
            info.num_elements for n, info in reader.infos.items() if not n.endswith("_scale")
        )
        shards = len(reader.files)
    facts: dict[str, object] = {
        "folder": folder.resolve().name,
        "dim": config.dim,
        "blocks": config.n_layers + 2 * config.n_refiner_layers,
        "parameters": parameters,
        "shards": shards,
        "size_bytes": {name: _size(folder / name) for name in COMPONENTS},
    }
    if stored is None:
        return facts | {"policy": "bf16_base", "quantized_linears": 0}
    quantization = raw[CONFIG_KEY]
    assert isinstance(quantization, dict)
    return facts | {
        "policy": stored.plan.policy,
        "quant_method": quantization.get("quant_method"),
        "quant_algo": quantization.get("quant_algo", list(quantization.get("schemes", {}))),
        "quantized_linears": len(stored.plan.quantized),
        "kept_linears": len(linears) - len(stored.plan.quantized),
        **({"ignore": quantization["ignore"]} if "ignore" in quantization else {}),
        "zimage_fp8": {k: v for k, v in stored.facts.items() if k != "rules"},
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
