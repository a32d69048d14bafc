"""A GPU that nobody has: what the benchmark asks NVML, answered from attributes."""

from collections.abc import Set

from zimage_fp8.bench.gpu import Reading
from zimage_fp8.bench.record import Gpu

MIB = 2**20


class FakeDriver:
    """One GPU: every reading can be set. Each look at the energy costs a joule."""

    def __init__(self) -> None:
        self.used: int | None = 1000 * MIB
        self.total: int | None = 8000 * MIB
        self.processes: dict[int, int] | None = {}
        self.energy = 0.0
        self.reading = Reading(1500.0, 400.0, 50.0, 0.0)

    def describe(self) -> Gpu:
        return Gpu(name="NVIDIA Test 9000", memory_bytes=self.total, driver="600.1")

    def used_bytes(self) -> int | None:
        return self.used

    def process_bytes(self, pids: Set[int]) -> int | None:
        if self.processes is None:
            return None
        return sum(size for pid, size in self.processes.items() if pid in pids)

    def energy_j(self) -> float | None:
        self.energy += 1
        return self.energy

    def read(self) -> Reading:
        return self.reading
