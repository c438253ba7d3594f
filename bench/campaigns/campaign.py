"""Campaigns: many runs of one task, each done once, by whichever process comes first.

A run that is finished is read instead of done again; one that was killed is resumed. Several processes with the same
output folder share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig, identity
from stablekd_fast.data import Dataset, open_dataset
from stablekd_fast.engine.checkpoint import check_same_run, load_metadata
from stablekd_fast.engine.schedule import Optimizer, Stage
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.memory import keep_freed_memory
from stablekd_fast.execution.precision import PRECISIONS
from stablekd_fast.files.owned import try_lock
from stablekd_fast.report import read_results
from stablekd_fast.report.events import plain
from stablekd_fast.run.builders import split_training_images
from stablekd_fast.run.distiller import Distiller

VIEW_SEED = 0
"""The view seed of all runs: every seed sees the same views in its own order, so that what is remembered serves all."""

FROM_THE_DATA = ("mean", "std")
"""Settings that a run takes from its data set, and saves so, where None is given."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What the runs of a campaign share; single runs may replace any setting but the paths."""

    data: str
    teacher: str
    teacher_weights: str
    student: str
    subset: float
    validation: float
    batch_size: int
    precision: str
    epochs: float = 8.0
    remember: str | None = None
    """The folder that keeps the teacher's outputs between runs."""


def add_task_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add the task's settings, the number of seeds, threads and the output folder."""
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--subset", type=float, default=10_000)
    parser.add_argument("--validation", type=float, default=2_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--precision", default="fp32", choices=[name for name in PRECISIONS if name != "auto"])
    parser.add_argument("--remember", help="directory in which to keep the teacher's outputs between runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", required=True)
    parser.set_defaults(**defaults)


def task_of(arguments: argparse.Namespace) -> Task:
    """Return the task of parsed arguments; set the threads and the allocator."""
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    return Task(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Task)})


def recorded_settings(arguments: argparse.Namespace) -> dict:
    """Return parsed arguments for the record: all but the paths, which are of one machine."""
    paths = ("data", "teacher_weights", "out", "remember")
    return {name: value for name, value in vars(arguments).items() if name not in paths}


class Campaign:
    """Runs of one task; their data set is opened once."""

    def __init__(self, task: Task, dataset: Dataset | None = None) -> None:
        self.task = task
        self.dataset = dataset or open_dataset(task.data)

    def run(self, out: Path, settings: dict, seed: int, *, tuning: bool = False) -> dict | None:
        """Train one setting unless it is done; return its row, or None while another process is at it.

        `settings` are fields of `DistillConfig` as plain values. With `tuning` the held-out training images stand in
        for the test split, which such a run never sees: its accuracy is that on them. Raises CheckpointError if the run
        in `out` has other settings.
        """
        with _claimed(out) as mine:
            if not mine:
                return None
            config = self._config(out, settings, seed)
            if (out / "results.json").exists():
                saved, own = load_metadata(out / "checkpoint.safetensors")["identity"], plain(identity(config))
                own = {name: value for name, value in own.items() if value is not None or name not in FROM_THE_DATA}
                check_same_run(out, {name: saved.get(name) for name in own}, own)
            else:
                self._train(config, tuning)
            return read_results(out / "results.json")["runs"][0]

    def _train(self, config: DistillConfig, tuning: bool) -> None:
        dataset = self.dataset
        if tuning:
            _, held_out = split_training_images(dataset, config)
            if held_out is None:
                raise ConfigError(
                    "validation=0 was given, but settings are tuned on held-out images; give a number above 0."
                )
            dataset = dataclasses.replace(dataset, test=held_out)
        Distiller(config, dataset=dataset).run(progress=False)

    def _config(self, out: Path, settings: dict, seed: int) -> DistillConfig:
        task, settings = dataclasses.asdict(self.task), dict(settings)
        remember = task.pop("remember")
        if "optimizer" in settings:
            settings["optimizer"] = Optimizer(**settings["optimizer"])
        if "stages" in settings:
            settings["stages"] = [
                Stage(**{**stage, "optimizer": Optimizer(**stage["optimizer"])}) for stage in settings["stages"]
            ]
        common = {
            "seed": seed,
            "view_seed": VIEW_SEED,
            "out": str(out),
            "resume": (out / "checkpoint.safetensors").exists(),
        }
        config = DistillConfig(**{**task, **settings, **common})
        if remember and "cache" not in settings and config.has_teacher:
            # Rows depend on the size of the teacher's batches.
            config.cache = CacheSettings(plan="all", directory=os.path.join(remember, f"batch-{config.batch_size}"))
        return config


@contextmanager
def _claimed(out: Path) -> Iterator[bool]:
    """Tell whether this process holds the run `out`; a process that dies lets go."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "claim", "w") as file:
        yield try_lock(file.fileno())
