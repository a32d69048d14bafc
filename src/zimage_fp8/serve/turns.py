"""Whose picture is next: clients take turns, and so do the requests of one client.

A request for ten pictures from somebody who also sent nine others holds up a newcomer for one
picture, not for a hundred.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """client: who asks. order: what the jobs of one request share."""

    @property
    def client(self) -> object: ...

    @property
    def order(self) -> object: ...


Job = TypeVar("Job", bound=Queued)
Waiting = TypeVar("Waiting")


class Turns(Generic[Job]):
    """Jobs in the order in which they would be drawn if no other came: a round robin of two levels.

    Who has had a turn goes to the end, and a newcomer starts there, so that nobody waits for more
    than one picture of each other client.
    """

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        self._clients: OrderedDict[object, OrderedDict[object, deque[Job]]] = OrderedDict()
        self.add(jobs)

    def add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            requests = self._clients.setdefault(job.client, OrderedDict())
            requests.setdefault(job.order, deque()).append(job)

    def pop(self) -> Job:
        """The next one, removed. Raises StopIteration when there is none."""
        client, requests = next(iter(self._clients.items()))
        order, jobs = next(iter(requests.items()))
        job = jobs.popleft()
        _end_turn(requests, order, is_done=not jobs)
        _end_turn(self._clients, client, is_done=not requests)
        return job

    def __iter__(self) -> Iterator[Job]:
        rest: Turns[Job] = Turns()
        for client, requests in self._clients.items():
            rest._clients[client] = OrderedDict((o, deque(jobs)) for o, jobs in requests.items())
        for _ in range(len(self)):
            yield rest.pop()

    def __len__(self) -> int:
        return sum(len(jobs) for requests in self._clients.values() for jobs in requests.values())


def _end_turn(waiting: OrderedDict[object, Waiting], who: object, *, is_done: bool) -> None:
    if is_done:
        del waiting[who]
    else:
        waiting.move_to_end(who)
