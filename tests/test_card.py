"""Model cards: every number is the record's, and the Hub can read the metadata."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fake_family import INT8, ROW, make_checkpoint, make_family
from fake_record import DIGEST, NUMBERS, PROMPTS, make_record, make_rich_record, make_variant
from zimage_fp8.bench.grid import grid_name
from zimage_fp8.bench.record import VariantRecord, write_record
from zimage_fp8.card import write_cards
from zimage_fp8.errors import ZImageError
from zimage_fp8.quant.policy import STATIC_POLICIES


@pytest.fixture(params=[False, True], ids=["full size", "nano"])
def is_test_model(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def family(tmp_path: Path, is_test_model: bool) -> Path:
    """A finished benchmark: record.json, pictures, and seven checkpoints in checkpoints/."""
    make_family(tmp_path, make_record(on_gpu=not is_test_model, is_test_model=is_test_model))
    return tmp_path


@pytest.fixture
def cards(family: Path) -> dict[str, str]:
    """policy -> README.md"""
    written = write_cards(family / "checkpoints", family / "record.json", namespace="me")
    return {card.policy: card.readme.read_text() for card in written}


def front_matter(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(text)
    assert isinstance(parsed, dict)
    return parsed


def test_one_card_per_policy(cards: dict[str, str]) -> None:
    assert list(cards) == list(STATIC_POLICIES)


def test_metadata(cards: dict[str, str], is_test_model: bool) -> None:
    for policy, card in cards.items():
        data = front_matter(card)
        base = "me/nano" if is_test_model else "Tongyi-MAI/Z-Image-Turbo"
        assert (data["base_model"], data["base_model_relation"]) == (base, "quantized")
        assert (data["license"], data["pipeline_tag"]) == ("apache-2.0", "text-to-image")
        assert data["library_name"] == "diffusers"
        assert [entry["text"] for entry in data["widget"]] == PROMPTS
        metrics = data["model-index"][0]["results"][0]["metrics"]
        values = {metric["type"]: metric["value"] for metric in metrics}
        _, _, psnr_db, ssim = NUMBERS[policy]
        assert values == {"psnr": pytest.approx(psnr_db), "ssim": pytest.approx(ssim)}


def test_the_introduction_has_this_variants_numbers(cards: dict[str, str]) -> None:
    for policy, card in cards.items():
        latencies, gib, psnr_db, ssim = NUMBERS[policy]
        mean = sum(latencies) / 2
        (line,) = re.findall(r"^\*\*This variant.*", card, re.MULTILINE)
        for number in (
            f"{mean:.3f} s/image", f"{mean / 1.1 - 1:+.1%} vs BF16", f"{gib:.2f} GiB",
            f"{1 - gib / 20:.1%} less", f"PSNR {psnr_db:.2f} dB / SSIM {ssim:.4f}",
        ):  # fmt: skip
            assert number in line


def test_the_table_marks_this_row_and_the_best(cards: dict[str, str]) -> None:
    for policy, card in cards.items():
        assert [line.split()[1] for line in card.splitlines() if "👈 |" in line] == [
            f"**{policy}**"
        ]
        assert [line.split()[1] for line in card.splitlines() if "★ |" in line] == ["online_fp8"]
        for other in NUMBERS:
            assert other in card


def test_the_curl_line_is_valid_shell_and_json(cards: dict[str, str], is_test_model: bool) -> None:
    name = "nano" if is_test_model else "Z-Image-Turbo"
    for policy, card in cards.items():
        (block,) = [b for b in re.findall(r"```bash\n(.*?)```", card, re.DOTALL) if "curl" in b]
        words = shlex.split(block.replace("\\\n", " "))
        body = json.loads(words[words.index("-d") + 1])
        assert body["prompt"] == PROMPTS[0]
        assert (body["guidance_scale"], body["num_inference_steps"]) == (0.0, 8)
        assert body["model"] == f"me/{name}-FP8-{policy}"


def test_honesty(cards: dict[str, str], is_test_model: bool) -> None:
    for card in cards.values():
        assert "Every picture took 8 forwards" in card
        assert "8 prompts × 9 forwards" in card
        assert "Sigmas: 1, 0.9545, 0.3, 0, 0." in card
        assert ("A test model, not an image model" in card) is is_test_model
        assert ("Fluent Emoji" in card) is is_test_model
        assert "`*.feed_forward.w[123]`" in card


def test_both_passes_intervals_and_warnings_are_on_the_card(tmp_path: Path) -> None:
    record = make_rich_record()
    make_family(tmp_path, record, ["full"])
    (card,) = write_cards(tmp_path / "checkpoints", tmp_path / "record.json", namespace="me")
    text = card.readme.read_text()
    places = [
        text.index(part)
        for part in (
            "### Pass A: `DIFFUSION_ATTENTION_BACKEND=SAGE_ATTN`, torch",
            "| **full** 👈 |",
            "### Pass B: `DIFFUSION_ATTENTION_BACKEND=TORCH_SDPA`, torch",
            "## How sure",
        )
    ]
    assert places == sorted(places)
    assert text[places[2] : places[3]].count("| online_fp8 ★ |") == 2  # one per size
    sure = text.partition("## How sure")[2]
    assert "another attention" in sure
    for title in ("Pass A, 64×32:", "Pass A, 32×64:", "Pass B, 64×32:", "Pass B, 32×64:"):
        assert sure.partition(title)[2].startswith("\n\n| Variant | Attention | Timed | p50")
    assert text.count("At 32×64:\n\n| Variant | Mean latency") == 2
    assert "Another program used 12 % of the GPU." in text
    assert "guidance cost 1.00 forwards more per step" in text
    assert len(front_matter(text)["widget"]) == len(record.parameters.prompts)


def test_the_family_lists_seven_and_points_here(cards: dict[str, str]) -> None:
    for policy, card in cards.items():
        family = card.partition("of this family")[2]
        listed = re.findall(r"^- \[me/\S+-FP8-(\S+)\]\(\S+\)(.*)", family, re.MULTILINE)
        assert [other for other, _ in listed] == list(STATIC_POLICIES)
        assert [other for other, here in listed if here] == [policy]


def test_every_picture_a_card_shows_lies_beside_it(family: Path, cards: dict[str, str]) -> None:
    for policy, card in cards.items():
        shown = set(re.findall(r"images/[\w.-]+\.png", card))
        assert len(shown) == 2 * len(PROMPTS)
        for picture in shown:
            assert (family / "checkpoints" / policy / picture).is_file()
    ours = (family / "pictures" / "attn-only" / "prompt1.png").read_bytes()
    assert (family / "checkpoints/attn-only/images/prompt1.png").read_bytes() == ours


def test_a_single_checkpoint_has_a_card_too(family: Path) -> None:
    (card,) = write_cards(family / "checkpoints/full", family / "record.json", namespace="me")
    assert card.readme == family / "checkpoints/full/README.md"
    assert card.readme.is_file()


def test_a_folder_without_checkpoints_is_refused(family: Path) -> None:
    with pytest.raises(ZImageError, match="no quantized checkpoint"):
        write_cards(family / "pictures", family / "record.json", namespace="me")


def test_a_record_of_another_model_is_refused(family: Path) -> None:
    make_checkpoint(family / "other", "full", "another/model")
    with pytest.raises(ZImageError, match="full is made from another/model"):
        write_cards(family / "other", family / "record.json", namespace="me")
    assert not (family / "other/README.md").exists()


def test_a_checkpoint_that_was_not_measured_is_refused(family: Path) -> None:
    make_checkpoint(family / "other", "mine", "x")
    with pytest.raises(ZImageError, match="no row for mine"):
        write_cards(family / "other", family / "record.json", namespace="me")


@pytest.mark.parametrize("is_test_model", [True], ids=["nano"])
class TestOneFamily:
    """What does not depend on the model."""

    def write(self, family: Path) -> list[Path]:
        cards = write_cards(family / "checkpoints", family / "record.json", namespace="me")
        return [card.readme for card in cards]

    def cards_in(self, family: Path) -> list[Path]:
        return list(family.glob("checkpoints/*/README.md"))

    def replace_record(self, family: Path, **changes: object) -> None:
        record = make_record(on_gpu=False, is_test_model=True).model_copy(update=changes)
        write_record(record, family / "record.json")

    def add_variant(self, family: Path, policy: str, **server: object) -> None:
        like = make_variant("online_fp8", "process_rss", on_gpu=False)
        facts = {"name": policy, "policy": policy, "server": {**like.server, **server}}
        self.replace_variants(family, lambda old: [*old, like.model_copy(update=facts)])

    def replace_variants(
        self, family: Path, change: Callable[[list[VariantRecord]], list[VariantRecord]]
    ) -> None:
        (main,) = make_record(on_gpu=False, is_test_model=True).passes
        variants = change(main.variants)
        self.replace_record(family, passes=[main.model_copy(update={"variants": variants})])

    def test_a_checkpoint_without_calibration_claims_none(self, family: Path) -> None:
        self.add_variant(family, "fp8-row")
        rules = [{"layers": "*.feed_forward.w[123]", "spec": ROW}]
        nothing = {"calibration": None, "calibration_digest": None}
        make_checkpoint(family / "checkpoints/row", "fp8-row", "nano", rules=rules, **nothing)
        self.write(family)
        card = (family / "checkpoints/row/README.md").read_text()
        assert "one scale per output row" in card
        assert "one scale per token, computed at run time" in card
        assert "nothing is calibrated" in card
        assert "static scale" not in card
        assert "share the scales of one calibration" not in card
        assert "share the scales" not in (family / "checkpoints/full/README.md").read_text()

    def test_a_format_of_our_own_is_nobody_elses(self, family: Path) -> None:
        """No instructions for vLLM-Omni, no name of ModelOpt's, and scales as they are."""
        self.add_variant(family, "int8-rot", calibration=DIGEST)
        rules = [{"layers": "*.feed_forward.w[123]", "spec": INT8}]
        folder = family / "checkpoints/int8-rot"
        make_checkpoint(folder, "int8-rot", "nano", is_own_format=True, rules=rules)
        self.write(family)
        card = (folder / "README.md").read_text()
        assert "me/nano-INT8-rot" in card
        assert {"modelopt", "vllm-omni"}.isdisjoint(front_matter(card)["tags"])
        assert "docker run" not in card
        assert "vLLM-Omni cannot read this format" in card
        assert "in its own format, 8 calibration prompts" in card
        assert "channel scales that are folded into the weights" in card
        assert "divided by 448" not in card
        full = (family / "checkpoints/full/README.md").read_text()
        assert "docker run" in full
        assert "in NVIDIA ModelOpt's format FP8" in full
        assert "divided by 448" in full
        assert "--force-cutlass-fp8" in full
        assert "share the scales of one calibration" not in full  # int8-rot is in the family

    def test_calibrated_checkpoints_say_so(self, family: Path) -> None:
        self.write(family)
        card = (family / "checkpoints/full/README.md").read_text()
        assert "one static scale per layer, from calibration" in card
        assert "all share the scales of one calibration" in card

    def test_every_checkpoint_in_the_folder_gets_a_card(self, family: Path) -> None:
        self.add_variant(family, "full[0-1]", calibration=DIGEST)
        make_checkpoint(family / "checkpoints/some", "full[0-1]", "nano")
        make_checkpoint(family / "checkpoints/.full.partial-1", "full", "nano")
        (family / "checkpoints/notes").mkdir()
        written = self.write(family)
        assert [path.parent.name for path in written] == [*STATIC_POLICIES, "some"]
        card = written[-1].read_text()
        assert "/me/nano-FP8-full-0-1) ← you are here" in card

    def test_of_two_engines_the_card_describes_our_own(self, family: Path) -> None:
        def with_another(old: list[VariantRecord]) -> list[VariantRecord]:
            full = next(variant for variant in old if variant.name == "full")
            slow = [r.model_copy(update={"latency_s": 9.0}) for r in full.requests]
            facts = {"name": "theirs", "engine": "vllm-omni", "requests": slow, "server": {}}
            return [old[0], full.model_copy(update=facts), *old[1:]]

        self.replace_variants(family, with_another)
        self.write(family)
        card = (family / "checkpoints/full/README.md").read_text()
        assert "**This variant (`full`)**: 0.850 s/image" in card
        assert "| theirs | 9.000 |" in card

    def test_what_the_server_told_is_on_the_card(self, family: Path) -> None:
        facts = {"gemm": {"w1 w3": "triton fp8"}, "attention": "fa3", "device": "cpu"}
        self.add_variant(family, "full[0-1]", calibration=DIGEST, **facts)
        make_checkpoint(family / "checkpoints/some", "full[0-1]", "nano")
        self.write(family)
        ran = (family / "checkpoints/some/README.md").read_text().partition("## What ran")[2]
        for line in ("- gemm, w1 w3: triton fp8", "- attention: fa3", "- sigmas: 1, 0.875, 0.75"):
            assert line in ran

    def test_two_checkpoints_of_one_policy_are_refused(self, family: Path) -> None:
        make_checkpoint(family / "checkpoints/copy", "full", "nano")
        with pytest.raises(ZImageError, match="are both full"):
            self.write(family)

    def test_a_checkpoint_calibrated_anew_is_refused(self, family: Path) -> None:
        make_checkpoint(family / "other", "full", "nano", calibration_digest="feed")
        with pytest.raises(ZImageError, match=f"the calibration feed, but {DIGEST} was measured"):
            write_cards(family / "other", family / "record.json")

    @pytest.mark.parametrize(
        ("model", "base"), [("someone/finetune", "someone/finetune"), ("nano", "me/nano")]
    )
    def test_the_base_is_the_model_that_was_measured(
        self, family: Path, model: str, base: str
    ) -> None:
        self.replace_record(family, model=model, is_test_model=False)
        make_checkpoint(family / "other", "full", model)
        (card,) = write_cards(family / "other", family / "record.json", namespace="me")
        data = front_matter(card.readme.read_text())
        assert data["base_model"] == base
        assert data.get("license") == ("apache-2.0" if model == "nano" else None)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("{", "cannot be read as JSON"),
            ("[]", "holds a list, expected an object"),
            ('{"quantization_config": {"zimage_fp8": null}}', "zimage_fp8 is a NoneType"),
            ('{"quantization_config": {"zimage_fp8": {}}}', "zimage_fp8: algorithm"),
            ('{"quantization_config": {"quant_algo": "FP8", "zimage_fp8": {}}}', "policy: Field"),
        ],
    )
    def test_a_damaged_checkpoint_is_one_sentence_and_no_card(
        self, family: Path, config: str, message: str
    ) -> None:
        (family / "checkpoints/attn-only/transformer/config.json").write_text(config)
        with pytest.raises(ZImageError, match=message):
            self.write(family)
        assert not self.cards_in(family)

    def test_no_quantization_is_no_checkpoint(self, family: Path) -> None:
        (family / "other/transformer").mkdir(parents=True)
        config = family / "other/transformer/config.json"
        config.write_text('{"quantization_config": null}')
        with pytest.raises(ZImageError, match="no quantized checkpoint"):
            write_cards(family / "other", family / "record.json")

    @pytest.mark.parametrize("picture", ["pictures/full/prompt1.png", "pictures/bf16_base"])
    def test_a_missing_picture_is_one_sentence_and_no_card(
        self, family: Path, picture: str
    ) -> None:
        (family / picture).rename(family / "elsewhere")
        with pytest.raises(ZImageError, match="cannot read the picture"):
            self.write(family)
        assert not self.cards_in(family)

    def test_comparisons_are_the_records_own(self, family: Path) -> None:
        before = sorted(family.iterdir())
        self.write(family)
        assert sorted(family.iterdir()) == before
        for prompt in range(len(PROMPTS)):
            (family / grid_name(prompt)).write_bytes(b"made by bench")
        self.write(family)
        for name in map(grid_name, range(len(PROMPTS))):
            assert (family / "checkpoints/full/images" / name).read_bytes() == b"made by bench"

    def test_when_one_card_cannot_be_written_none_is(self, family: Path) -> None:
        (family / "checkpoints/attn-only/images").write_text("not a folder")
        with pytest.raises(ZImageError, match="cannot write"):
            self.write(family)
        left = {path.name for path in (family / "checkpoints/full").iterdir()}
        assert left == {"transformer"}

    def test_partly_identical_pictures(self, family: Path) -> None:
        self.replace_variants(family, lambda old: [*map(with_one_identical_picture, old)])
        self.write(family)
        card = (family / "checkpoints/full/README.md").read_text()
        assert "PSNR 20.50 dB (1 of 2 identical) / SSIM" in card
        assert "mean of the 1 pictures that differ" in card


def with_one_identical_picture(variant: VariantRecord) -> VariantRecord:
    first, *others = variant.requests
    if first.quality:
        same = first.quality.model_copy(update={"psnr_db": float("inf")})
        first = first.model_copy(update={"quality": same})
    return variant.model_copy(update={"requests": [first, *others]})
