"""Every silent trap, planted in a sound checkpoint, is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_fp8.checkpoint.verify import verify
from zimage_fp8.errors import UsageError
from zimage_fp8.quantize import CalibrationOptions, quantize

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    (folder / "prompts.txt").write_text("a house\n")
    options = CalibrationOptions(
        prompts=folder / "prompts.txt", forwards=2, size=(32, 32), device="cpu"
    )
    (out,) = quantize(str(tiny_model), ["ffn-attn-qkv"], folder / "out", calibration=options)
    return out


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_sound_checkpoint_has_no_findings(sound: Path, tiny_model: Path) -> None:
    layers: list[tuple[int, int]] = []
    found = verify(sound, tiny_model, lambda *step: layers.append(step))
    assert found.findings == ()
    assert found.is_sound
    assert (found.policy, found.quantized_linears) == ("ffn-attn-qkv", 24)
    assert layers == [(i, 24) for i in range(1, 25)]


def edit_config(change: Callable[[dict], None]) -> Damage:  # type: ignore[type-arg]
    def damage(folder: Path) -> None:
        path = folder / "transformer" / "config.json"
        raw = json.loads(path.read_text())
        change(raw["quantization_config"])
        path.write_text(json.dumps(raw))

    return damage


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    def damage(folder: Path) -> None:
        for path in (folder / "transformer").glob("*.safetensors"):
            tensors = load_file(path)
            if name not in tensors:
                continue
            changed = change(tensors.pop(name))
            if changed is not None:
                tensors[name] = changed
            save_file(tensors, path)
            if changed is None:
                index = next((folder / "transformer").glob("*.index.json"))
                listed = json.loads(index.read_text())
                del listed["weight_map"][name]
                index.write_text(json.dumps(listed))
            path.chmod(0o644)

    return damage


def nan_code(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.view(torch.uint8).clone()
    raw[0, 0] = 0x7F
    return raw.view(codes.dtype)


def other_code(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.view(torch.uint8).clone()
    raw[1, 1] ^= 1
    return raw.view(codes.dtype)


def own_ignore(*patterns: str) -> Damage:
    return edit_config(lambda c: c.update(ignore=["model*", "lm_head*", *patterns]))


Q = "layers.0.attention.to_q"

TRAPS: dict[str, tuple[Damage, str, str]] = {
    "missing weight scale": (
        edit_tensor(f"{Q}.weight_scale", lambda _: None), "tensors", f"{Q}.weight_scale: missing",
    ),
    "missing input scale": (
        edit_tensor(f"{Q}.input_scale", lambda _: None), "tensors", f"{Q}.input_scale: missing",
    ),
    "BF16 where FP8 is promised": (
        edit_tensor(f"{Q}.weight", lambda t: t.to(torch.bfloat16)),
        "tensors", f"{Q}.weight: BF16, expected F8_E4M3",
    ),
    "FP8 where BF16 is promised": (
        edit_tensor("layers.0.attention.to_out.0.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "tensors", "to_out.0.weight: F8_E4M3, expected BF16",
    ),
    "text encoder not ignored": (
        edit_config(lambda c: c.update(ignore=[p for p in c["ignore"] if p != "model*"])),
        "ignore", "does not cover model*",
    ),
    "lm_head not ignored": (
        edit_config(lambda c: c.update(ignore=[p for p in c["ignore"] if p != "lm_head*"])),
        "ignore", "does not cover lm_head*",
    ),
    "key of the nested form": (
        edit_config(lambda c: c.update(exclude_modules=c.pop("ignore"))),
        "exclude_modules", "belongs to the nested form",
    ),
    "a literal that matches too much": (
        own_ignore("*attention.to_out*", "*adaLN*", "t_emb*", "cap_emb*", "all_*", "refiner.0"),
        "ignore", "'refiner.0' is matched as a substring",
    ),
    "unequal input scales": (
        edit_tensor(f"{Q}.input_scale", lambda t: t * 2),
        "layers.0.attention.to_qkv", "input_scale",
    ),
    "NaN scale": (
        edit_tensor(f"{Q}.input_scale", lambda t: t * torch.nan), f"{Q}.input_scale", "not finite",
    ),
    "negative scale": (
        edit_tensor(f"{Q}.weight_scale", lambda t: -t), f"{Q}.weight_scale", "must be positive",
    ),
    "NaN code": (edit_tensor(f"{Q}.weight", nan_code), f"{Q}.weight", "codes are NaN"),
    "all zero": (edit_tensor(f"{Q}.weight", lambda t: (t.float() * 0).to(t.dtype)),
        f"{Q}.weight", "all zero"),
    "wrong shape": (
        edit_tensor(f"{Q}.weight", lambda t: t[:-1].clone()), "tensors", "shape [95, 96]",
    ),
    "mixed precision in a group": (
        own_ignore("*attention.to_out*", "*adaLN*", "t_emb*", "cap_emb*", "all_*", "*.to_k"),
        "layers.0.attention.to_qkv", "one GEMM, one type",
    ),
    "not the policy it claims": (
        edit_config(lambda c: c["zimage_fp8"].update(policy="full")), "policy", "claims 'full'",
    ),
    "what must stay BF16": (
        own_ignore("*attention.to_out*", "*adaLN*", "t_emb*", "cap_emb*", "*final*"),
        "all_x_embedder.2-1", "must stay BF16",
    ),
    "missing component": (lambda f: shutil.rmtree(f / "vae"), "vae", "missing"),
    "missing index": (lambda f: (f / "model_index.json").unlink(), "model_index.json", "missing"),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_found(copy: Path, trap: str) -> None:
    damage, where, said = TRAPS[trap]
    damage(copy)
    found = verify(copy)
    assert not found.is_sound
    errors = [f for f in found.findings if f.level == "error"]
    assert any(where == f.where and said in f.message for f in errors), errors


@pytest.mark.parametrize(
    ("damage", "where", "said"),
    [
        (edit_tensor(f"{Q}.weight_scale", lambda t: t * 1.5), f"{Q}.weight_scale", "not amax/448"),
        (edit_tensor(f"{Q}.weight", other_code), f"{Q}.weight", "codes differ"),
        (
            edit_tensor("layers.0.attention_norm1.weight", lambda t: t * 2),
            "layers.0.attention_norm1.weight",
            "differs from the source",
        ),
    ],
)
def test_the_source_tells_what_the_checkpoint_alone_cannot(
    copy: Path, tiny_model: Path, damage: Damage, where: str, said: str
) -> None:
    damage(copy)
    found = verify(copy, tiny_model)
    assert any(where == f.where and said in f.message for f in found.findings), found.findings


def test_unequal_weight_scales_and_private_files_are_warnings(copy: Path) -> None:
    edit_tensor(f"{Q}.weight_scale", lambda t: t * 2)(copy)
    shard = sorted((copy / "transformer").glob("*.safetensors"))[0]
    shard.chmod(0o600)
    found = verify(copy)
    assert found.is_sound
    assert {(f.level, f.where) for f in found.findings} == {
        ("warning", "layers.0.attention.to_qkv"),
        ("warning", shard.name),
    }


def test_an_unquantized_model_is_not_a_checkpoint(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="not quantized"):
        verify(tiny_model)


OWN_POLICY = """
name = "own"
summary = "Feed-forward, one scale per row."

[[rule]]
layers = "*.feed_forward.w[123]"
spec = "e4m3-row"
why = "a test"
"""


def test_a_policy_of_one_s_own_is_checked_by_the_rules_it_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(OWN_POLICY)
    (out,) = quantize(str(tiny_model), [str(tmp_path / "own.toml")], tmp_path / "out")
    assert verify(out, tiny_model).findings == ()

    def claim_more(config: dict) -> None:  # type: ignore[type-arg]
        config["zimage_fp8"]["rules"][-2]["layers"] = "*"

    edit_config(claim_more)(out)
    errors = [finding.message for finding in verify(out).findings if finding.level == "error"]
    assert errors == [m for m in errors if m.startswith("claims 'own' but differs in")]
    assert errors
