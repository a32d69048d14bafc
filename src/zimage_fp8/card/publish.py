"""From folders on this disk to repositories and a collection on the Hub.

Every request says what should be there afterwards, not what to change: a repository and a
collection are made when missing, a file is sent when it differs from the one on the Hub. Running
the same command again therefore continues where an earlier run was stopped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported

from zimage_fp8.card.family import Card
from zimage_fp8.errors import UsageError, ZImageError

HIDDEN = (".*", "*/.*")  # fnmatch: * goes across slashes
WEIGHTS = ".safetensors"

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class RepositoryPlan:
    """One repository: its full name, the folder it mirrors, and each file's path and bytes."""

    name: str
    folder: Path
    files: dict[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class Publication:
    """Everything one run sends, known before anything is sent."""

    namespace: str
    collection: str
    description: str
    repositories: list[RepositoryPlan]

    def listing(self) -> str:
        """Every file, with its size, under its repository; then the collection."""
        lines = []
        for plan in self.repositories:
            lines.append(f"{plan.name}  ({len(plan.files)} files, {plan.size_bytes:,} bytes)")
            lines += [f"  {size:>14,}  {path}" for path, size in plan.files.items()]
        names = ", ".join(plan.name.rpartition("/")[2] for plan in self.repositories)
        return "\n".join([*lines, f"collection {self.namespace}/{self.collection}: {names}"])


def plan_publication(cards: Sequence[Card]) -> Publication:
    """What would be sent for these cards, whose README.md are written already.

    Raises UsageError for names that the Hub does not allow, ZImageError for a folder without card.
    """
    namespace, base = cards[0].namespace, cards[0].record.model.rpartition("/")[2]
    plans = []
    for card in cards:
        try:
            validate_repo_id(card.repository)
        except HFValidationError as error:
            raise UsageError(f"the Hub allows no repository {card.repository!r}: {error}") from None
        files = {path.relative_to(card.folder).as_posix(): path for path in _visible(card.folder)}
        if "README.md" not in files:
            raise ZImageError(f"{card.folder} has no README.md to publish")
        sizes = {name: files[name].stat().st_size for name in sorted(files)}
        plans.append(RepositoryPlan(card.repository, card.folder, sizes))
    kept = f"{base} with its linear layers in 8 bits: measured quality, speed and memory."
    return Publication(namespace, f"{base}-FP8", kept, plans)


def _visible(folder: Path) -> Iterator[Path]:
    """Files of a checkpoint; nothing whose name, or whose folder's name, starts with a dot."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts):
            yield path


def publish(publication: Publication, api: HfApi, on_step: OnStep) -> str:
    """Make the repositories and the collection what `publication` says; return the collection.

    api: knows the Hub's address and the token. Raises ZImageError: who may not write there, a
    repository that holds weights of something else, or what the Hub or the network refused.
    """
    with _in_sentences("ask who the token belongs to"):
        _refuse_strangers(publication.namespace, api.whoami())
    for plan in publication.repositories:
        with _in_sentences(f"create {plan.name}"):
            api.create_repo(plan.name, exist_ok=True)
        with _in_sentences(f"read what {plan.name} holds"):
            _refuse_other_weights(plan, api.list_repo_files(plan.name))
        with _in_sentences(f"upload to {plan.name}"):
            api.upload_folder(
                repo_id=plan.name,
                folder_path=plan.folder,
                ignore_patterns=list(HIDDEN),
                commit_message="zimage-fp8: checkpoint and card",
            )
        on_step(f"{api.endpoint}/{plan.name}")
    with _in_sentences(f"create the collection {publication.collection}"):
        collection = api.create_collection(
            publication.collection,
            namespace=publication.namespace,
            description=publication.description,
            exists_ok=True,
        )
    for plan in publication.repositories:
        with _in_sentences(f"put {plan.name} into the collection"):
            api.add_collection_item(collection.slug, plan.name, "model", exists_ok=True)
    return f"{api.endpoint}/collections/{collection.slug}"


def _refuse_strangers(namespace: str, account: dict[str, object]) -> None:
    """A repository can be made in one's own name and in those of one's organizations."""
    organizations = account.get("orgs")
    listed = organizations if isinstance(organizations, list) else []
    own = [str(account.get("name")), *(str(organization["name"]) for organization in listed)]
    if namespace not in own:
        raise UsageError(
            f"the token belongs to {own[0]}, who cannot publish as {namespace}",
            param="namespace",
            hint=f"--namespace is one of: {', '.join(own)}",
        )


def _refuse_other_weights(plan: RepositoryPlan, there: Sequence[str]) -> None:
    """Readers open every weight file they find, so two checkpoints in one repository are none."""
    others = [path for path in there if path.endswith(WEIGHTS) and path not in plan.files]
    if others:
        raise ZImageError(
            f"{plan.name} already holds weights that are not in {plan.folder}: "
            + ", ".join(sorted(others)),
            hint="delete them on the Hub, or choose another --namespace",
        )


@contextmanager
def _in_sentences(what: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence, and say what to do about it."""
    try:
        yield
    # ValueError: the Hub's own check of the card. RuntimeError: one of several upload threads.
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explained(f"cannot {what}", error) from error


HINTS = {
    401: "the token is not valid any more: hf auth login, or set HF_TOKEN",
    403: "the token may not do this: make one with write access at huggingface.co/settings/tokens",
    409: "something of this name, or another upload to it, is in the way: wait a minute, run again",
    413: "the Hub says that this is too large for the account",
    429: "too many requests: run the same command again later; it continues where it stopped",
}
LATER = "the Hub has a problem of its own: run the same command again later"
UNREACHABLE = (httpx2.TransportError, ConnectionError, TimeoutError)


def _explained(cannot: str, error: BaseException) -> ZImageError:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _explained(cannot, error.__cause__)
    if isinstance(error, LocalTokenNotFoundError):
        hint = "hf auth login, or set HF_TOKEN"
        return ZImageError(f"{cannot}: there is no token for the Hub", hint=hint)
    if isinstance(error, HfHubHTTPError):
        return _refusal(cannot, error)
    if isinstance(error, UNREACHABLE):
        return ZImageError(
            f"{cannot}: the Hub cannot be reached ({error or type(error).__name__})",
            hint="run the same command again: it continues where it stopped",
        )
    if isinstance(error, PermissionError):  # hf_xet: the storage behind the Hub refused
        return ZImageError(f"{cannot}: {error}", hint=HINTS[401])
    return ZImageError(f"{cannot}: {' '.join(str(error).split())}")


def _refusal(cannot: str, error: HfHubHTTPError) -> ZImageError:
    status = error.response.status_code
    says = error.server_message or error.response.reason_phrase or "no reason given"
    wait = error.response.headers.get("retry-after")
    when = f"; it asks to wait {wait} s" if wait else ""
    hint = LATER if status >= 500 else HINTS.get(status)
    return ZImageError(f"{cannot}: the Hub answered {status}, {says}{when}", hint=hint)
