"""`stablekd bench end-to-end`: epochs, steps and wall seconds until each method reaches one accuracy.

A learning-rate cycle is made for its length, so a method is not read off along one long run: it is trained anew for
each budget of epochs, and the smallest budget whose mean accuracy over the seeds reaches the target counts. The target
is what the goal's method reaches with the goal's budget.

Wall time is steps times the seconds of a step. Those are measured for each kind of step of each method, side by side in
one process: as people write it in plain PyTorch, and by the engine with the live teacher and with a full cache. So what
a method gains and what the engine gains are told apart. Evaluation and starting up are in none of them.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stablekd_fast.bench.campaigns.campaign import Campaign, Task
from stablekd_fast.bench.core import Measured, pinned, scratch
from stablekd_fast.bench.runs.stages import CACHE, LIVE, PLAIN, TUNED, StageBench
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import METHODS
from stablekd_fast.report import read_events

EPOCHS = "epochs to the target accuracy, in percent"


@dataclass(frozen=True)
class Goal:
    """The accuracy to reach: that of a method after so many epochs, written as `kd:40`."""

    method: str
    epochs: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        method, _, epochs = text.partition(":")
        try:
            goal = cls(method, float(epochs))
        except ValueError:
            goal = cls(method, 0.0)
        if method not in METHODS or goal.epochs <= 0:
            raise ConfigError(f"The goal {text!r} was given; give METHOD:EPOCHS, for instance kd:40.")
        return goal


@dataclass(frozen=True)
class Trained:
    """A method that was trained with one budget: a row for each seed."""

    method: str
    epochs: float
    runs: list[dict]
    stages: list[dict]
    """The `groups` and `steps` of each stage."""
    batch: int

    @property
    def accuracy(self) -> float:
        return statistics.fmean(run["accuracy"] for run in self.runs)


class Race:
    """Trains all methods on one task, under `out`; finished runs are read instead of done again."""

    def __init__(self, task: Task, settings: dict[str, dict], seeds: int, out: Path) -> None:
        self.campaign, self.settings, self.seeds, self.out = Campaign(task), settings, seeds, out

    def train(self, method: str, epochs: float) -> Trained:
        """Train all seeds. Raises ConfigError while another process trains one of them."""
        settings = {**self.settings.get(method, {}), "method": method, "epochs": epochs, "evaluate_every": 0}
        folders = [self.out / "runs" / f"{method}-{epochs:g}-{seed}" for seed in range(self.seeds)]
        rows = [self.campaign.run(folder, settings, seed) for seed, folder in enumerate(folders)]
        if None in rows:
            raise ConfigError(
                f"{folders[rows.index(None)]} is being trained by another process; start again when it is done."
            )
        starts = [event for event in read_events(folders[0]) if event["kind"] == "stage_start"]
        stages = [{"groups": e["groups"], "steps": e["last_step"] - e["first_step"]} for e in starts]
        return Trained(method, epochs, rows, stages, settings.get("batch_size", self.campaign.task.batch_size))

    def reach(self, method: str, budgets: list[float], target: float) -> Trained:
        """Train with the smallest budget that reaches the target, or with the largest."""
        for epochs in sorted(budgets):
            found = self.train(method, epochs)
            if found.accuracy >= target:
                break
        return found


def run_end_to_end(
    task: Task,
    settings: dict[str, dict],
    goal: Goal,
    budgets: list[float],
    methods: list[str],
    *,
    seeds: int,
    rounds: int,
    out: Path,
    show: Callable[[list[dict]], None],
) -> Measured:
    """Train, time and compare: how many epochs each method needs, and how many wall seconds to reach the target.

    `settings` are fields of `DistillConfig` for methods that have been tuned. Raises ConfigError for settings that do
    not fit, WrongResult if one way to run a step computes something else than another.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ConfigError(f"The methods {', '.join(unknown)} do not exist; choose of {', '.join(METHODS)}.")
    race = Race(task, settings, seeds, out)
    base = race.train(goal.method, goal.epochs)
    target = base.accuracy
    budgets = [*(budget for budget in budgets if budget < goal.epochs), goal.epochs]
    found = [race.reach(method, budgets, target) for method in methods if method != goal.method]
    found.append(base)
    measured = Measured(tables={EPOCHS: [_epochs_row(one, target) for one in found]})
    with scratch(out) as folder, pinned() as measured.settings:
        speeds = _speeds(found, race.campaign, rounds, folder, show)
    reached = [one for one in found if one.accuracy >= target]
    walls = [row for one in reached for row in _wall_rows(one, speeds, base)]
    show(walls)
    measured.rows = [*itertools.chain(*speeds.values()), *walls]
    return measured


def _epochs_row(found: Trained, target: float) -> dict:
    accuracies = [run["accuracy"] for run in found.runs]
    return {
        "method": found.method,
        "epochs": found.epochs,
        "target": 100 * target,
        "reached": "yes" if found.accuracy >= target else "no",
        "accuracy": 100 * found.accuracy,
        "spread": 100 * statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "steps": sum(stage["steps"] for stage in found.stages),
        "batch": found.batch,
        "accuracies": ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies),
    }


def _speeds(
    found: list[Trained], campaign: Campaign, rounds: int, folder: Path, show: Callable
) -> dict[str, list[dict]]:
    """Return rows of the stage bench by kind of step; a kind that several methods share is measured once."""
    task, speeds = campaign.task, {}
    bench = StageBench(task.teacher, task.student, campaign.dataset, task.precision, folder)
    for one in found:
        for stage in one.stages:
            key = _kind(one, stage)
            if key not in speeds:
                speeds[key] = bench.seconds(one.method, stage["groups"], one.batch, rounds)
                show(speeds[key])
    return speeds


def _kind(found: Trained, stage: dict) -> str:
    return json.dumps([found.method, stage["groups"], found.batch])


def _wall_rows(found: Trained, speeds: dict[str, list[dict]], goal: Trained) -> list[dict]:
    """Return a row for each way to run the method's steps, against the goal's in plain PyTorch.

    `spread_seconds` is that of a run whose steps all lie at the edge of theirs.
    """
    baseline = _totals(goal, PLAIN, speeds)["median_seconds"]
    ways = {way: _totals(found, way, speeds) for way in (PLAIN, TUNED, LIVE, CACHE)}
    return [
        {
            "bench": "end-to-end",
            "case": f"wall seconds to the accuracy of {goal.method} after {goal.epochs:g} epochs",
            "contender": f"{found.method}, {way}",
            "role": "ours" if way in (LIVE, CACHE) else "rival",
            **seconds,
            "ratio": baseline / seconds["median_seconds"],
            "baseline": f"{goal.method}, {PLAIN}",
            "variant": f"{found.epochs:g} epochs",
            "limit": "peak",
            "share_of_limit": seconds["limit_seconds"] / seconds["median_seconds"],
        }
        for way, seconds in ways.items()
        if seconds["median_seconds"] > 0
    ]


def _totals(found: Trained, way: str, speeds: dict[str, list[dict]]) -> dict[str, float]:
    """Add up the seconds of all steps of a run; 0 if its steps cannot be run this way."""
    totals = dict.fromkeys(("median_seconds", "spread_seconds", "limit_seconds"), 0.0)
    for stage in found.stages:
        for row in speeds[_kind(found, stage)]:
            if row["contender"] == way:
                totals = {what: total + stage["steps"] * row[what] for what, total in totals.items()}
    return totals
