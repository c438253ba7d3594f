"""Where a run stands, and how it took its latest merge: what a resume needs beside tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field

WINDOW = 10
"""Training losses are averaged over this many steps before they are compared with the loss at the merge."""


@dataclass
class MergeRecord:
    """One merge as it is reported; survives a resume as plain JSON."""

    step: int
    stage: int
    exposure_gap: dict[str, float]
    max_output_difference: float
    loss_at_merge: dict[str, float]
    merged: list[str]
    """Groups that are new in this stage."""
    steps_until_recovered: int | None = None
    """Steps until the merged groups' mean loss over the last `WINDOW` steps fell below its value at the merge."""
    steps_seen: int = 0
    recent: list[float] = field(default_factory=list)

    def watch(self, losses: dict[str, float]) -> None:
        """Take one training step's losses by group name."""
        self.steps_seen += 1
        recent = deque(self.recent, maxlen=WINDOW)
        recent.append(sum(losses[name] for name in self.merged))
        self.recent = list(recent)
        if self.steps_until_recovered is None and len(recent) == WINDOW:
            if sum(recent) / WINDOW < sum(self.loss_at_merge[name] for name in self.merged):
                self.steps_until_recovered = self.steps_seen

    def report(self) -> dict:
        values = asdict(self)
        for private in ("recent", "steps_seen"):
            del values[private]
        return values


@dataclass
class Progress:
    """Where a run stands. With the student and the optimizer state, all that a resume needs."""

    step: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    merge: MergeRecord | None = None
    """The latest merge."""
    exposure: dict[str, float] = field(default_factory=dict)
    """Measured at the end of the latest finished stage."""

    @property
    def seconds(self) -> float:
        """Spent on training steps and on waiting for data, evaluation left out."""
        return self.train_seconds + self.wait_seconds
