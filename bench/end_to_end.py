"""`stablekd bench end-to-end`: epochs, steps and wall seconds until each method reaches one accuracy.

A learning-rate cycle is made for its length, so a method is not read off along one long run: it is trained anew for each
budget of epochs, and the smallest budget whose mean accuracy over the seeds reaches the target counts. The target is what
the goal's method reaches with the goal's budget.

Wall time is steps times the seconds of a step. Those are measured for each kind of step of each method, side by side in
one process: as people write it in plain PyTorch, and by the engine with the live teacher and with a full cache. So what a
method gains and what the engine gains are told apart. Evaluation and starting up are in none of them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stablekd_fast.bench.campaign import Campaign, Task
from stablekd_fast.bench.core import pinned
from stablekd_fast.bench.stages import CACHE, LIVE, PLAIN, TUNED, StageBench
from stablekd_fast.bench.teacher import scratch
from stablekd_fast.errors import ConfigError
from stablekd_fast.report import read_events
from stablekd_fast.schedule import METHODS


@dataclass(frozen=True)
class Goal:
    """`kd:40`: the accuracy to reach is that of this method after so many epochs."""

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
    """A method with one budget: a row for each seed."""

    method: str
    epochs: float
    runs: list[dict]
    stages: list[dict]
    """`groups` and `steps` of each."""
    batch: int

    @property
    def accuracy(self) -> float:
        return statistics.fmean(run["accuracy"] for run in self.runs)


class Race:
    """Runs of all methods on one task, under `out`; finished runs are read instead of done again."""

    def __init__(self, task: Task, settings: dict[str, dict], seeds: int, out: Path) -> None:
        self.campaign, self.settings, self.seeds, self.out = Campaign(task), settings, seeds, out

    def train(self, method: str, epochs: float) -> Trained:
        """All seeds. Raises ConfigError while another process trains one of them."""
        settings = {**self.settings.get(method, {}), "method": method, "epochs": epochs, "evaluate_every": 0}
        folders = [self.out / "runs" / f"{method}-{epochs:g}-{seed}" for seed in range(self.seeds)]
        rows = [self.campaign.run(folder, settings, seed) for seed, folder in enumerate(folders)]
        if None in rows:
            raise ConfigError(f"{folders[rows.index(None)]} is being trained by another process; start again when it is done.")
        starts = [event for event in read_events(folders[0]) if event["kind"] == "stage_start"]
        stages = [{"groups": e["groups"], "steps": e["last_step"] - e["first_step"]} for e in starts]
        return Trained(method, epochs, rows, stages, settings.get("batch_size", self.campaign.task.batch_size))

    def reach(self, method: str, budgets: list[float], target: float) -> Trained:
        """With the smallest budget that reaches the target, or the largest."""
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
    show: Callable[[str, list[dict]], None],
) -> dict:
    """Train, time and compare; `show` gets each table as it is made.

    `settings`: for methods that have been tuned, fields of `DistillConfig`. Raises ConfigError for settings that do not
    fit, WrongResult if one way to run a step computes something else than another.
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
    epochs = [_epochs_row(one, target) for one in found]
    show(f"epochs to {100 * target:.2f} % ({goal.method} after {goal.epochs:g} epochs)", epochs)
    speeds = _speeds(found, race.campaign, rounds, out, show)
    walls = [_wall_row(one, speeds, base, target) for one in found]
    show("wall seconds, and how many times faster than the goal in plain PyTorch", walls)
    return {"target": target, "epochs": epochs, "wall": walls, "rows": sum(speeds.values(), [])}


def _epochs_row(found: Trained, target: float) -> dict:
    accuracies = [run["accuracy"] for run in found.runs]
    return {
        "method": found.method,
        "epochs": found.epochs,
        "reached": "yes" if found.accuracy >= target else "no",
        "accuracy": 100 * found.accuracy,
        "spread": 100 * statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "steps": sum(stage["steps"] for stage in found.stages),
        "batch": found.batch,
        "accuracies": ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies),
    }


def _speeds(found: list[Trained], campaign: Campaign, rounds: int, out: Path, show: Callable) -> dict[str, list[dict]]:
    """Rows of the stage bench by kind of step; a kind that several methods share is measured once."""
    task, speeds = campaign.task, {}
    with scratch(out) as folder, pinned():
        bench = StageBench(task.teacher, task.student, campaign.dataset, task.precision, folder)
        for one in found:
            for stage in one.stages:
                key = _kind(one, stage)
                if key not in speeds:
                    speeds[key] = bench.seconds(one.method, stage["groups"], one.batch, rounds)
                    columns = ("contender", "ratio", "images_per_second")
                    show(speeds[key][0]["case"], [{name: row[name] for name in columns} for row in speeds[key]])
    return speeds


def _kind(found: Trained, stage: dict) -> str:
    return json.dumps([found.method, stage["groups"], found.batch])


def _wall_row(found: Trained, speeds: dict[str, list[dict]], goal: Trained, target: float) -> dict:
    own, base = _seconds(found, speeds), _seconds(goal, speeds)
    row = {"method": found.method, "reached": "yes" if found.accuracy >= target else "no"}
    for way in (PLAIN, TUNED, LIVE, CACHE):
        row[way] = own.get(way)
        row[f"{way}, times"] = base[PLAIN] / own[way] if way in own else None
    return row


def _seconds(found: Trained, speeds: dict[str, list[dict]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for stage in found.stages:
        for row in speeds[_kind(found, stage)]:
            total[row["contender"]] = total.get(row["contender"], 0.0) + stage["steps"] * row["median_seconds"]
    return total
