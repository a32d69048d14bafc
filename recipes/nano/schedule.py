"""How far a training is, in wall time, over runs that resume each other."""

import math
import time


class Schedule:
    """Progress from 0 to 1 over `total_s`, of which this run takes `run_s`, setting up included.

    Setting up (compiling, filling caches) takes from a run's time but not from the schedule:
    whatever remains after it is spread over the progress still to make, so that the last run ends
    at exactly 1.
    """

    def __init__(
        self, started: float, run_s: float, total_s: float, spent_s: float = 0.0, done: float = 0.0
    ) -> None:
        self.started, self.run_s, self.total_s = started, run_s, total_s
        self.spent_s, self.done = spent_s, done
        self.trained_from = self.training_s = self.gain = 0.0

    def begin(self) -> None:
        """Setting up is over."""
        self.trained_from = self.age_s()
        self.training_s = max(0.0, self.run_s - self.trained_from)
        later_runs = max(0.0, self.total_s - self.spent_s - self.run_s)
        if self.training_s > 0:
            self.gain = (1 - self.done) * (self.training_s / (self.training_s + later_runs))

    def age_s(self) -> float:
        return time.monotonic() - self.started

    def is_over(self, age_s: float) -> bool:
        return age_s >= self.run_s

    def trained_s(self, age_s: float) -> float:
        return age_s - self.trained_from

    def progress(self, age_s: float) -> float:
        if not self.gain:
            return self.done
        return self.done + self.gain * (self.trained_s(min(age_s, self.run_s)) / self.training_s)

    def state_dict(self, age_s: float) -> dict[str, float]:
        return {"spent_s": self.spent_s + age_s, "done": self.progress(age_s)}


def lr_factor(progress: float, step: int, warmup_steps: int) -> float:
    """Linear warm-up in steps, times a cosine down to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * cosine)
