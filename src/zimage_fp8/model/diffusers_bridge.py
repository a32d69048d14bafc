"""Our checkpoints inside diffusers' own pipeline.

diffusers cannot open ModelOpt FP8 files by itself: with the quantization config it raises, without
it it reads the codes as weights. This swaps 8-bit linears into its transformer instead:

    from diffusers import ZImagePipeline
    from zimage_fp8.model.diffusers_bridge import load_diffusers_transformer

    transformer = load_diffusers_transformer("checkpoints/full")
    pipeline = ZImagePipeline.from_pretrained("checkpoints/full", transformer=transformer)
"""

from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn

from zimage_fp8.checkpoint.dialects import read_stored, stored_infos, tensor_problems
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import CheckpointError, UsageError
from zimage_fp8.layout import linear_shapes, read_config, tensor_shapes
from zimage_fp8.quant.linear import QuantLinear
from zimage_fp8.quant.policy import Plan


def load_diffusers_transformer(
    pipeline_folder: str | Path, dtype: torch.dtype = torch.bfloat16
) -> ZImageTransformer2DModel:
    """diffusers' transformer, its quantized linears multiplying in 8 bits, on the CPU.

    Raises UsageError when the folder is not quantized and CheckpointError when tensors do not
    match.
    """
    folder = Path(pipeline_folder) / "transformer"
    config, raw = read_config(folder)
    stored = read_stored(raw, linear_shapes(config))
    if stored is None:
        raise UsageError(f"{folder} is not quantized: diffusers opens it by itself")
    with torch.device("meta"):
        model = ZImageTransformer2DModel.from_config(raw)
    with ShardReader(folder) as reader:
        expected = stored_infos(stored.plan, tensor_shapes(config))
        if problems := tensor_problems(reader.infos, expected):
            raise CheckpointError(str(folder), problems)
        for layer in stored.plan.quantized:
            parent, _, leaf = layer.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _linear(layer, stored.plan, reader))
        for name, _ in list(model.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            value = nn.Parameter(reader.read(name).to(dtype), requires_grad=False)
            model.get_submodule(parent).register_parameter(leaf, value)
    return model.eval()


def _linear(layer: str, plan: Plan, reader: ShardReader) -> QuantLinear:
    spec = plan.entries[layer].spec
    assert spec is not None
    scale = reader.read(f"{layer}.weight_scale")
    return QuantLinear(
        spec,
        reader.read(f"{layer}.weight"),
        scale if spec.weight == "per-channel" else scale.reshape(()),
        reader.read(f"{layer}.input_scale").reshape(()) if spec.is_static else None,
    )
