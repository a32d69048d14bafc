"""Publishing: our code and the Hub's own client against the Hub's interface on loopback."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, constants

from fake_family import make_family
from fake_record import make_record
from hub_stub import TOKEN, Hub, Refusal, running
from zimage_fp8.bench.record import write_record
from zimage_fp8.card import write_cards
from zimage_fp8.card.publish import Publication, plan_publication, publish
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.quant.policy import STATIC_POLICIES

# The Hub's client warns about its own way to send a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FEW = STATIC_POLICIES[:3]  # of the seven; one test publishes them all
REPOSITORIES = [f"me/Z-Image-Turbo-FP8-{policy}" for policy in FEW]
COLLECTION = "me/z-image-turbo-fp8-0123456789abcdef01234567"


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    # The stub speaks LFS, the client's other way to send large files; Xet's storage is Rust inside.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running(hub) as url:
        yield HfApi(endpoint=url, token=TOKEN)
        close_session()


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return family_of(FEW, tmp_path)


def family_of(policies: Sequence[str], folder: Path) -> Path:
    make_family(folder, make_record(), policies)
    for policy in policies:
        checkpoint = folder / "checkpoints" / policy
        (checkpoint / "transformer" / "weights.safetensors").write_bytes(policy.encode() * 100)
        (checkpoint / ".cache").mkdir()
        (checkpoint / ".cache" / "left-over").write_text("not for the Hub")
        (checkpoint / "transformer" / ".hidden").write_text("neither")
    return folder


def planned(family: Path, namespace: str = "me") -> Publication:
    cards = write_cards(family / "checkpoints", family / "record.json", namespace=namespace)
    return plan_publication(cards)


def send(family: Path, api: HfApi) -> str:
    return publish(planned(family), api, lambda done: None)


def test_seven_repositories_hold_exactly_the_listed_files(
    tmp_path: Path, hub: Hub, api: HfApi
) -> None:
    publication = planned(family_of(STATIC_POLICIES, tmp_path))
    steps: list[str] = []
    collection = publish(publication, api, steps.append)
    names = [f"me/Z-Image-Turbo-FP8-{policy}" for policy in STATIC_POLICIES]
    assert list(hub.files) == names
    assert steps == [f"{api.endpoint}/{name}" for name in names]
    assert hub.collections[COLLECTION]["items"] == names
    assert collection == f"{api.endpoint}/collections/{COLLECTION}"
    for plan in publication.repositories:
        there = hub.files[plan.name]
        del there[".gitattributes"]  # the Hub's own
        assert {path: len(content) for path, content in there.items()} == plan.files
        for path, content in there.items():
            assert content == (plan.folder / path).read_bytes()
    assert "README.md" in there
    assert "images/comparison-prompt0.png" in there


def test_the_collection_has_all_in_order(family: Path, hub: Hub, api: HfApi) -> None:
    send(family, api)
    (collection,) = hub.collections.values()
    assert collection["items"] == REPOSITORIES
    assert collection["title"] == "Z-Image-Turbo-FP8"
    assert len(collection["description"]) <= 150  # the Hub's limit


def test_a_second_run_sends_nothing_again(family: Path, hub: Hub, api: HfApi) -> None:
    send(family, api)
    hub.commits.clear()
    hub.requests.clear()
    send(family, api)
    assert hub.commits == []
    assert not [line for line in hub.requests if line.startswith("PUT")]


def test_a_stopped_run_continues_where_it_stopped(family: Path, hub: Hub, api: HfApi) -> None:
    hub.refusals = [Refusal(r"POST /api/models/.*ffn-attn-out/commit", 403, times=1, message="no")]
    with pytest.raises(ZImageError, match=r"upload to me/\S+ffn-attn-out: the Hub answered 403"):
        send(family, api)
    sent = list(hub.commits)
    assert 0 < len(sent) < len(REPOSITORIES)
    send(family, api)
    assert hub.commits == REPOSITORIES
    assert [len(collection["items"]) for collection in hub.collections.values()] == [3]


def test_a_changed_card_is_sent_alone(family: Path, hub: Hub, api: HfApi) -> None:
    send(family, api)
    hub.requests.clear()
    hub.commits.clear()
    record = make_record().model_copy(update={"created": "2026-11-23T12:00:00+00:00"})
    write_record(record, family / "record.json")
    send(family, api)
    assert hub.commits == REPOSITORIES
    assert not [line for line in hub.requests if line.startswith("PUT")]


def test_the_list_names_every_file_with_its_size(family: Path) -> None:
    listing = planned(family).listing()
    assert listing.count("README.md") == 3
    assert re.search(r"^ +400  transformer/weights\.safetensors$", listing, re.MULTILINE)
    assert "hidden" not in listing
    assert "left-over" not in listing
    assert listing.splitlines()[-1].startswith("collection me/Z-Image-Turbo-FP8: ")


def test_weights_of_another_checkpoint_are_in_the_way(family: Path, hub: Hub, api: HfApi) -> None:
    hub.files[REPOSITORIES[0]] = {"transformer/old.safetensors": b"x", "notes.txt": b"mine"}
    with pytest.raises(ZImageError, match=r"already holds weights .*transformer/old\.safetensors"):
        send(family, api)
    assert hub.commits == []


@pytest.mark.parametrize(
    ("pattern", "status", "headers", "sentence", "hint"),
    [
        ("GET /api/whoami", 401, {}, "ask who the token belongs to: the Hub answered 401", "login"),
        ("POST /api/repos/create", 403, {}, r"create me/\S+: the Hub answered 403", "write access"),
        (
            "POST /api/repos/create", 429, {"Retry-After": "120"},
            "the Hub answered 429, slow down; it asks to wait 120 s", "run the same command again",
        ),
        ("POST /api/repos/create", 500, {}, "answered 500", "a problem of its own"),
        ("PUT /lfs/", 403, {}, r"upload to me/\S+: the Hub answered 403", "write access"),
        ("POST /api/validate-yaml", 400, {}, r"upload to me/\S+: ", ""),
        ("POST /api/collections/.*/items", 403, {}, "into the collection: the Hub", "write access"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(
    family: Path,
    hub: Hub,
    api: HfApi,
    pattern: str,
    status: int,
    headers: dict[str, str],
    sentence: str,
    hint: str,
) -> None:
    hub.refusals = [Refusal(pattern, status, message="slow down", headers=headers)]
    with pytest.raises(ZImageError, match=sentence) as caught:
        send(family, api)
    assert hint in (caught.value.hint or "")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_sentence(family: Path) -> None:
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(ZImageError, match="the Hub cannot be reached") as caught:
        send(family, nowhere)
    assert "continues where it stopped" in (caught.value.hint or "")


def test_a_wrong_token_is_one_sentence(family: Path, api: HfApi) -> None:
    with pytest.raises(ZImageError, match="the Hub answered 401"):
        send(family, HfApi(endpoint=api.endpoint, token="hf_wrong"))


def test_a_strangers_namespace_is_refused_before_anything_is_made(
    family: Path, hub: Hub, api: HfApi
) -> None:
    with pytest.raises(UsageError, match="cannot publish as somebody") as caught:
        publish(planned(family, "somebody"), api, print)
    assert caught.value.hint == "--namespace is one of: me, team"
    assert hub.files == {}


def test_a_namespace_that_is_no_name_is_refused(family: Path) -> None:
    with pytest.raises(UsageError, match="the Hub allows no repository 'me!/"):
        planned(family, "me!")


def command(family: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = ["card", str(family / "checkpoints"), "--results", str(family / "record.json")]
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "zimage_fp8", *arguments, *options],
        env={**os.environ, **quiet, "HF_HOME": str(family / "home"), **environment},
        capture_output=True,
        text=True,
    )


def test_the_command_lists_first_and_then_publishes(family: Path, hub: Hub, api: HfApi) -> None:
    done = command(
        family, "--publish", "--namespace", "me", HF_ENDPOINT=str(api.endpoint), HF_TOKEN=TOKEN
    )
    assert done.returncode == 0, done.stderr
    cards, listing, results = done.stdout.partition("me/Z-Image-Turbo-FP8-full  (")
    assert cards.count("README.md") == 3
    assert listing
    assert results.splitlines()[-1].endswith(f"/collections/{COLLECTION}")
    assert list(hub.files) == REPOSITORIES


def test_a_dry_run_lists_and_asks_the_hub_nothing(family: Path, hub: Hub, api: HfApi) -> None:
    endpoint = str(api.endpoint)
    done = command(family, "--publish", "--namespace", "me", "--dry-run", HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    assert "transformer/weights.safetensors" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("collection me/")
    assert hub.requests == []


def test_without_a_token_the_command_says_how_to_get_one(family: Path, api: HfApi) -> None:
    endpoint = str(api.endpoint)
    done = command(family, "--publish", "--namespace", "me", HF_ENDPOINT=endpoint, HF_TOKEN="")
    assert done.returncode == 1
    assert "error: cannot ask who the token belongs to: there is no token" in done.stderr
    assert "hint: hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--dry-run"], "--dry-run does nothing without --publish"),
        (["--publish"], "--publish needs --namespace"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    done = command(tmp_path, *options)
    assert (done.returncode, sentence in done.stderr) == (2, True)


def test_the_clients_pipeline_for_xet_sends_small_files_and_continues(
    family: Path, hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client does by default; only the storage of large files is left out."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for weights in family.rglob("*.safetensors"):
        weights.unlink()
    hub.refusals = [Refusal(r"POST /api/models/.*ffn-attn-qkv/commit", 403, times=1)]
    with pytest.raises(ZImageError, match=r"upload to me/\S+ffn-attn-qkv: the Hub answered 403"):
        send(family, api)
    send(family, api)
    assert hub.commits == REPOSITORIES
