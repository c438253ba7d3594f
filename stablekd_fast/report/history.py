"""A run's events sorted by what they tell, ready for plots and tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from stablekd_fast.report.measures import measure_of


@dataclass
class History:
    """One run. Events that a resumed run logged a second time count once: the latest is kept."""

    label: str
    method: str
    seed: int | None = None
    steps_per_epoch: float = 1.0
    start: dict = field(default_factory=dict)
    """The `run_start` event."""
    stages: list[dict] = field(default_factory=list)
    train: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    merges: list[dict] = field(default_factory=list)

    @classmethod
    def from_events(cls, label: str, events: list[dict]) -> History:
        """Sort the events of a run. `label` names the run, and its method too where the events do not."""
        starts = [event for event in events if event["kind"] == "run_start"]
        start = starts[-1] if starts else {}
        return cls(
            label=label,
            method=start.get("method", label),
            seed=start.get("seed"),
            steps_per_epoch=start.get("steps_per_epoch") or 1.0,
            start=start,
            stages=_latest(events, "stage_start", "stage"),
            train=_latest(events, "train", "step"),
            evaluations=_latest(events, "evaluate", "split", "step"),
            merges=_latest(events, "merge", "stage"),
        )

    def merge_epochs(self) -> list[float]:
        """The epochs at which stages after the first begin."""
        return [stage["first_step"] / self.steps_per_epoch for stage in self.stages[1:]]

    @property
    def measure(self) -> str:
        """What is evaluated: the accuracy, or the cosine with the teacher's embedding."""
        return measure_of(self.evaluations)

    def reached(self, split: str) -> list[tuple[float, float | None]]:
        """(epoch, accuracy or cosine) of every evaluation on `split`."""
        return [(event["epoch"], event[self.measure]) for event in self.evaluations if event["split"] == split]

    def reached_over_seconds(self, split: str) -> list[tuple[float, float | None]]:
        """(seconds of training, accuracy or cosine) of every evaluation on `split`; none for logs that lack the
        seconds."""
        own = [event for event in self.evaluations if event["split"] == split and "seconds" in event]
        return [(event["seconds"], event[self.measure]) for event in own]

    def losses(self) -> dict[tuple[int, str], list[tuple[float, float | None]]]:
        """(epoch, loss) by stage and group name."""
        curves: dict[tuple[int, str], list[tuple[float, float | None]]] = {}
        for event in self.train:
            stage = self._stage_of(event["step"])
            for group, loss in event["losses"].items():
                curves.setdefault((stage, group), []).append((event["epoch"], loss))
        return curves

    def _stage_of(self, step: int) -> int:
        """Index of the stage that trained up to `step`."""
        begun = [i for i, stage in enumerate(self.stages) if stage["first_step"] < step]
        return begun[-1] if begun else 0


def _latest(events: list[dict], kind: str, *keys: str) -> list[dict]:
    """The events of one kind in order, only the latest of those that agree in `keys`."""
    found = {tuple(event[key] for key in keys): event for event in events if event["kind"] == kind}
    return list(found.values())
