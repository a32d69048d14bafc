"""The engine's text encoder against transformers' Qwen3, and what it refuses to load."""

import gc
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_model
from compare import relative_error, same_bits, sqnr_db
from zimage_fp8.checkpoint.shards import ShardReader, TensorInfo, info_of, write_shard
from zimage_fp8.engine import pinned
from zimage_fp8.engine.graphs import GraphCache
from zimage_fp8.engine.pinned import host_buffers
from zimage_fp8.engine.qwen3 import LayerLayout, read_qwen3_config
from zimage_fp8.engine.text import FastTextEncoder
from zimage_fp8.errors import CheckpointError, ModelError, UsageError
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.model.source import NANO_FOLDER
from zimage_fp8.model.text import TextEncoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32
SHORT = "a 3d icon of a red apple on a teal background"
OTHER = "a 3d icon of a blue whale on a green background"
LONG = (
    "a 3d icon of a brown teddy bear, a soft rounded toy with smooth shading and gentle light, "
    "shown alone in the middle, seen from the front, on a plain yellow background, nothing else"
)
PROMPTS = (SHORT, LONG)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; 4 heads on 2 key-value heads; `model.` names, tied head, several shards."""
    out = tmp_path_factory.mktemp("text") / "random-text"
    fake_model.write_fake_model(out, "tiny", parts=["text_encoder", "tokenizer"])
    assert len(list((out / "text_encoder").glob("*.safetensors"))) > 1
    return out


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of `tiny` to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@torch.inference_mode()
def captions(encoder: TextEncoder | FastTextEncoder) -> Tensor:
    return torch.cat([encoder.encode(prompt) for prompt in PROMPTS]).float().cpu()


def reference(folder: Path) -> Tensor:
    return captions(TextEncoder(folder, FP32, CPU))


def folder_of(name: str, tiny: Path) -> Path:
    return {"nano": NANO_FOLDER, "tiny": tiny}[name]


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_fp32_equals_transformers(name: str, tiny: Path) -> None:
    folder = folder_of(name, tiny)
    found = captions(FastTextEncoder(folder, FP32, CPU))
    assert relative_error(found, reference(folder)) < 1e-5


@pytest.mark.parametrize(("name", "limit"), [("nano", 47.8), ("tiny", 38.1)])
def test_bf16_is_closer_than_transformers_bf16(name: str, limit: float, tiny: Path) -> None:
    """Measured 48.8 dB against transformers' 46.9 (nano), 39.1 against 37.3 (random weights):
    norms and rotation are rounded once."""
    folder = folder_of(name, tiny)
    exact = reference(folder)
    theirs = sqnr_db(captions(TextEncoder(folder, BF16, CPU)), exact)
    assert sqnr_db(captions(FastTextEncoder(folder, BF16, CPU)), exact) > max(limit, theirs)


@pytest.mark.parametrize(("name", "limit"), [("nano", 30.5), ("tiny", 15.2)])
def test_fp8_costs_what_eight_bits_cost(name: str, limit: float, tiny: Path) -> None:
    """Measured 31.5 dB on nano, which is trained, and 16.2 on random weights, whose attention is
    far more sensitive."""
    folder = folder_of(name, tiny)
    encoder = FastTextEncoder(folder, BF16, CPU, precision="fp8")
    assert sqnr_db(captions(encoder), reference(folder)) > limit


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_offloading_changes_nothing(tiny: Path, precision: Any) -> None:
    resident = FastTextEncoder(tiny, BF16, CPU, precision=precision)
    streamed = FastTextEncoder(tiny, BF16, CPU, precision=precision, offload=True)
    for prompt in (SHORT, LONG, SHORT):
        same_bits(streamed.encode(prompt), resident.encode(prompt))
    assert streamed.device_bytes < resident.device_bytes
    assert streamed.host_bytes > resident.host_bytes


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_fused_kernels_give_the_same_caption(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole encoder on Triton's kernels, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off; the tests below run the kernels")
    encoder = FastTextEncoder(tiny, FP32, CPU)
    expected = encoder.encode(SHORT)
    for op in ("add_norm", "qwen_rope", "swiglu"):
        # Through sys.modules: the package exports a function by the name of its module.
        monkeypatch.setattr(sys.modules[f"zimage_fp8.kernels.{op}"], "runs_triton", lambda _: True)
    assert relative_error(encoder.encode(SHORT), expected) < 1e-5


def test_a_caption_does_not_depend_on_its_padding(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FastTextEncoder(tiny, FP32, CPU)
    found = encoder.encode(SHORT)
    assert found.shape == (len(encoder.tokens(SHORT)), 128)
    monkeypatch.setattr("zimage_fp8.engine.text.BUCKET", 128)
    assert relative_error(encoder.encode(SHORT), found) < 1e-6


def test_bytes_are_what_is_held(tiny: Path) -> None:
    config = read_qwen3_config(tiny / "text_encoder")
    with ShardReader(tiny / "text_encoder") as reader:
        infos = reader.infos
    layers = sum(
        info.num_bytes
        for name, info in infos.items()
        if name.startswith("model.layers.") and not name.startswith("model.layers.3.")
    )
    encoder = FastTextEncoder(tiny, BF16, CPU)
    rotary = 512 * 64 * 4
    assert 0 <= encoder.device_bytes - rotary - layers < 3 * 12 * 256  # alignment
    assert encoder.host_bytes == infos["model.embed_tokens.weight"].num_bytes
    fp8 = LayerLayout(config, "fp8", BF16).num_bytes
    assert fp8 < 0.52 * LayerLayout(config, "bf16", BF16).num_bytes


def test_prompts_that_are_too_long_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="at most 512"):
        FastTextEncoder(tiny, BF16, CPU).encode("word " * 600)


def rewrite(folder: Path, change: Any) -> None:
    """Write the tensors of a text encoder again, in one file, after `change(tensors)`."""
    with ShardReader(folder) as reader:
        tensors = {name: reader.read(name).clone() for name in reader.infos}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    change(tensors)
    infos: dict[str, TensorInfo] = {name: info_of(tensor) for name, tensor in tensors.items()}
    write_shard(folder / "model.safetensors", infos, tensors.__getitem__, {"format": "pt"})


def test_every_wrong_tensor_is_named_at_once(copy: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(7)
        tensors["model.layers.2.self_attn.q_proj.bias"] = torch.ones(256)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)

    rewrite(copy / "text_encoder", damage)
    with pytest.raises(CheckpointError) as raised:
        FastTextEncoder(copy, BF16, CPU)
    assert len(raised.value.problems) == 4
    said = str(raised.value)
    assert "layers.0.mlp.up_proj.weight: missing" in said
    assert "q_norm.weight: shape [7], expected [64]" in said
    assert "q_proj.bias: not part of" in said
    assert "embed_tokens.weight: type I8" in said


def test_what_nothing_reads_may_be_missing(copy: Path, tiny: Path) -> None:
    def trim(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith(("model.layers.3.", "model.norm.")):
                del tensors[name]

    rewrite(copy / "text_encoder", trim)
    expected = captions(FastTextEncoder(tiny, BF16, CPU))
    same_bits(captions(FastTextEncoder(copy, BF16, CPU)), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"num_key_value_heads": 3}, "cannot share 3 key-value heads"),
        ({"rope_theta": None}, "rope_theta"),
        ({"vocab_size": 1000}, "different models"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
    ],
)
def test_other_configs_are_refused(copy: Path, change: dict[str, Any], said: str) -> None:
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=said):
        FastTextEncoder(copy, BF16, CPU)


def test_both_spellings_of_the_rotation_mean_the_same(copy: Path) -> None:
    path = copy / "text_encoder" / "config.json"
    raw = json.loads(path.read_text())
    old = read_qwen3_config(path.parent)
    assert raw.pop("rope_theta") == 1e6
    del raw["rope_scaling"]
    path.write_text(
        json.dumps(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    )
    assert read_qwen3_config(path.parent) == old


# On a GPU ---------------------------------------------------------------------------------------

MODES: list[dict[str, Any]] = [
    {},
    {"offload": True},
    {"precision": "fp8"},
    {"precision": "fp8", "offload": True},
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full width, three layers of which two run, a small vocabulary."""
    text = fake_model.TEXT_FULL | {"num_hidden_layers": 3, "vocab_size": 2944}
    scales = fake_model.SCALES
    out = tmp_path_factory.mktemp("wide") / "random-wide"
    scales["wide"] = replace(scales["full"], text=text)
    try:
        fake_model.write_fake_model(out, "wide", parts=["text_encoder", "tokenizer"], device=CUDA)
    finally:
        del scales["wide"]
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", ["nano", "wide"])
def test_cuda_equals_the_cpu(name: str, mode: dict[str, Any], wide: Path) -> None:
    folder = {"nano": NANO_FOLDER, "wide": wide}[name]
    exact = reference(folder)
    found = sqnr_db(captions(FastTextEncoder(folder, BF16, CUDA, **mode)), exact)
    on_cpu = sqnr_db(captions(FastTextEncoder(folder, BF16, CPU, **mode)), exact)
    assert found > on_cpu - 1, f"{found:.1f} dB, on the CPU {on_cpu:.1f} dB"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_replays_of_one_bucket_are_independent(precision: Any, wide: Path) -> None:
    encoder = FastTextEncoder(wide, BF16, CUDA, precision=precision)
    streamed = FastTextEncoder(wide, BF16, CUDA, precision=precision, offload=True)
    assert max(len(encoder.tokens(SHORT)), len(encoder.tokens(OTHER))) <= 32
    first, other, again = (encoder.encode(prompt) for prompt in (SHORT, OTHER, SHORT))
    encoder.encode(LONG)  # another graph, in the same pool
    same_bits(again, first)
    same_bits(encoder.encode(OTHER), other)
    assert relative_error(other[-1], first[-1]) > 0.01
    for prompt, caption in ((SHORT, first), (OTHER, other), (SHORT, again)):
        same_bits(streamed.encode(prompt), caption)


@pytest.mark.gpu
def test_graphs_go_to_the_cache_that_is_given() -> None:
    cache = GraphCache(CUDA)
    encoder = FastTextEncoder(NANO_FOLDER, BF16, CUDA, graphs=cache)
    for prompt in (SHORT, OTHER, LONG):
        encoder.encode(prompt)
    assert len(cache) == 2  # one per bucket


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_device_bytes_are_what_the_device_holds(mode: dict[str, Any], wide: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    encoder = FastTextEncoder(wide, BF16, CUDA, **mode)
    held = torch.cuda.memory_allocated() - before
    assert abs(held - encoder.device_bytes) < 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_fp32_on_cuda(precision: Any) -> None:
    exact = reference(NANO_FOLDER)
    found = captions(FastTextEncoder(NANO_FOLDER, FP32, CUDA, precision=precision))
    assert sqnr_db(found, exact) > (100 if precision == "bf16" else 30.5)


def test_host_buffers_on_the_cpu_are_ordinary_memory() -> None:
    buffers = host_buffers(3, 1000, CPU)
    assert [(len(buffer), buffer.dtype) for buffer in buffers] == [(1000, torch.uint8)] * 3
    assert len({buffer.data_ptr() for buffer in buffers}) == 3


@pytest.mark.gpu
def test_host_buffers_are_pinned_while_they_are_used() -> None:
    (buffer,) = host_buffers(1, 3 << 20, CUDA)
    assert buffer.is_pinned()
    buffer.fill_(7)
    assert (buffer.to(CUDA, non_blocking=True) == 7).all()
    memory = buffer.numpy()  # keeps the bytes, not their pinning
    del buffer
    assert not torch.from_numpy(memory).is_pinned()


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_plain", lambda size: torch.empty(size, device=CUDA))
    with pytest.raises(ModelError, match="1000 bytes of host memory cannot be pinned"):
        host_buffers(1, 1000, CUDA)
