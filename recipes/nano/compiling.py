"""torch.compile, tried once and loudly given up."""

from collections.abc import Callable

import torch
import torch._dynamo

from recipes.nano.workspace import Workspace

torch._dynamo.config.recompile_limit = 32  # three token counts and two caption buckets are known


def try_compiled(
    work: Workspace, what: str, attempt: Callable[[], object], give_up: Callable[[], None]
) -> bool:
    """Run `attempt`, which compiles on first use; on failure say so, undo it and go on eagerly."""
    begun = work.age_s()
    try:
        attempt()
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises, training can go on
        work.log(f"COMPILING FAILED, GOING ON EAGERLY ({what}): {error!r}"[:2000])
        give_up()
        attempt()
        return False
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    work.log(f"{what}: compiled in {work.age_s() - begun:.1f} s, {graphs} graphs so far")
    return True
