"""card: write the model cards from measured numbers, and publish what they describe."""

from pathlib import Path
from typing import Annotated

import typer

from zimage_fp8.errors import UsageError

PLACEHOLDER = "your-name"


def card(
    checkpoints: Annotated[Path, typer.Argument(help="The folder with one folder per policy.")],
    results: Annotated[Path, typer.Option(help="The record.json that bench wrote.")],
    namespace: Annotated[
        str, typer.Option(help="Your name, or your organization's, on the Hub.")
    ] = PLACEHOLDER,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Create the repositories and a collection on the Hub and upload everything.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="With --publish: write the cards, list every file, send nothing."
        ),
    ] = False,
) -> None:
    """Write README.md, the model card, into each checkpoint; with --publish, upload them.

    The list of files is printed before anything is sent. A run that was stopped continues where
    it stopped: the Hub is sent only what it does not have.

    zimage-fp8 card results/checkpoints --results results/record.json
    """
    if dry_run and not publish:
        raise UsageError("--dry-run does nothing without --publish", param="dry_run")
    if publish and namespace == PLACEHOLDER:
        raise UsageError(
            "--publish needs --namespace: your name, or your organization's, on the Hub",
            param="namespace",
        )
    from zimage_fp8.card import write_cards

    cards = write_cards(checkpoints, results, namespace=namespace)
    print("\n".join(str(one.readme) for one in cards))
    if not publish:
        return

    from huggingface_hub import HfApi

    from zimage_fp8.card.publish import plan_publication
    from zimage_fp8.card.publish import publish as send

    publication = plan_publication(cards)
    print(publication.listing(), flush=True)
    if not dry_run:
        print(send(publication, HfApi(), lambda done: print(done, flush=True)))
