"""The benches: one description of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ActionYesNo, Namespace

from stablekd_fast.cli.options import listed
from stablekd_fast.cli.spelling import Parser
from stablekd_fast.errors import StableKDError

if TYPE_CHECKING:
    from stablekd_fast.bench.core import Measured

Show = Callable[[list[dict]], None]
Options = Mapping[str, dict[str, Any]]
"""What `add_argument` is told about each option."""


def _text(help: str, default: str | None = None) -> dict[str, Any]:
    return {"type": str | None, "default": default, "help": help}


def _flag(help: str) -> dict[str, Any]:
    return {"action": "store_true", "help": help}


LEAST = (
    "exit code 1 if a ratio to the baseline is below this; with --against: if it is below this share of the earlier one"
)
OUTPUT: Options = {
    "--json": _text("file for rows, machine, versions, settings and commit"),
    "--csv": _text("file for the same, one line per row"),
    "--html": _text("file for a page with plots, which needs nothing else"),
    "--against": _text("file of an earlier --json to compare with"),
    "--fail_below": {"type": float | None, "default": None, "help": LEAST},
}
"""What every bench takes."""

DIRECTORY: Options = {
    "--directory": {"type": str, "default": ".", "help": "where rows are put for the time of the bench"},
}
IMAGES: Options = {
    "--small": _text("data set of 32 px images, e.g. CIFAR-10"),
    "--large": _text("folder data set of photographs"),
}


@dataclass(frozen=True)
class Bench:
    """One bench: what its help says, which options it takes, and how it runs."""

    help: str
    options: Options
    run: Callable[[Namespace, Show], Measured]
    rounds: int | None = None
    """The rounds by default; None for a bench that takes no such option."""
    short: tuple[str, ...] = ()
    """Words that make it short. The tests append them to the commands that the documentation shows."""

    def parser(self) -> Parser:
        parser, rounds = Parser(), {}
        if self.rounds is not None:
            rounds["--rounds"] = {
                "type": int,
                "default": self.rounds,
                "help": "turns of each contender; the median counts",
            }
        for name, settings in {**self.options, **rounds, **OUTPUT}.items():
            parser.add_argument(name, **settings)
        return parser


def _bench_kernels(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.operators.kernels import Setting, run_kernels

    setting = Setting(asked.device, asked.compile, asked.quick)
    return run_kernels(setting, listed(asked.ops), rounds=asked.rounds, threads=asked.threads, show=show)


def _bench_cache(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.cache import run_cache

    return run_cache(Path(asked.directory), asked.rounds, show, asked.quick)


def _bench_teacher(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.teacher import Images, run_teacher

    return run_teacher(Path(asked.directory), Images(asked.small, asked.large), asked.rounds, show)


def _bench_objectives(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.objectives import run_objectives
    from stablekd_fast.run.builders import pick_device

    device = pick_device(asked.device)
    return run_objectives(asked.data, asked.precision, asked.rounds, show, device=device)


def _bench_step(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.profile import profile_steps
    from stablekd_fast.bench.runs.step import run_step
    from stablekd_fast.bench.runs.teacher import Images

    images, directory = Images(asked.small, asked.large), Path(asked.directory)
    if asked.profile or asked.trace:
        return profile_steps(directory, images, Path(asked.trace) if asked.trace else None)
    if asked.device != "cpu":
        from stablekd_fast.bench.runs.device_steps import run_device_steps
        from stablekd_fast.run.builders import pick_device

        return run_device_steps(images, pick_device(asked.device), asked.rounds, asked.compile, show)
    return run_step(directory, images, asked.rounds, asked.compile, show)


def _bench_budget(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.budget import Question, run_budget

    return run_budget(Question(**{field.name: asked[field.name] for field in dataclasses.fields(Question)}))


def _bench_plan(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.plan import run_plan

    return run_plan(Path(asked.directory), asked.data, show, asked.rounds)


def _bench_loader(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.loader import run_loader

    return run_loader(asked.small, asked.large, asked.rounds, show, batch_size=asked.batch_size, workers=asked.workers)


def _bench_dropin(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.dropin import run_dropin

    return run_dropin(Path(asked.directory), asked.data, asked.rounds, show, quick=asked.quick)


def _bench_own_loop(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.runs.own_loop import run_own_loop

    return run_own_loop(Path(asked.directory), asked.data, asked.rounds, show, quick=asked.quick)


def _bench_end_to_end(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.campaigns.accuracy import tuned_settings
    from stablekd_fast.bench.campaigns.campaign import Task
    from stablekd_fast.bench.campaigns.end_to_end import Goal, run_end_to_end

    return run_end_to_end(
        Task(**{field.name: asked[field.name] for field in dataclasses.fields(Task) if field.name in asked}),
        tuned_settings(Path(asked.tuning)) if asked.tuning else {},
        Goal.parse(asked.goal),
        _numbers("budgets", asked.budgets),
        listed(asked.methods),
        seeds=asked.seeds,
        rounds=asked.rounds,
        out=Path(asked.out),
        show=show,
    )


def _bench_trust(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.trust.campaign import run_trust

    return run_trust(Path(asked.out), listed(asked.lines), short=asked.short)


def _show_file(asked: Namespace, show: Show) -> Measured:
    from stablekd_fast.bench.core import Measured
    from stablekd_fast.bench.output import by_case, read_json

    found = read_json(Path(asked.file))
    for rows in by_case(found["rows"]):
        show(rows)
    origin = {name: found.get(name, {}) for name in ("machine", "versions", "settings")}
    return Measured(found["rows"], found.get("tables", {}), origin=origin)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in listed(text)]
    except ValueError as error:
        raise StableKDError(
            f"--{name} {text} was given; give numbers with commas between, for instance 2,4,8."
        ) from error


KERNELS: Options = {
    "--ops": _text("operators, with commas between; all by default"),
    "--device": {"type": str, "default": "cpu", "help": "cpu or cuda"},
    "--compile": {"action": ActionYesNo, "default": True, "help": "torch.compile as a rival too"},
    "--quick": _flag("a few small cases"),
    "--aot": _flag("no timing: compile for GPUs, and count bytes"),
    "--every_variant": _flag("with --aot: all variants, which takes hours"),
    "--threads": {"type": int | None, "default": None, "help": "all usable cores by default"},
}
STEP: Options = {
    **DIRECTORY,
    **IMAGES,
    "--device": {"type": str, "default": "cpu", "help": "cpu or cuda"},
    "--compile": {"action": ActionYesNo, "default": True, "help": "compiled steps too"},
    "--profile": _flag("where the time of a step goes, instead"),
    "--trace": _text("file for a Chrome trace of a profiled step"),
}
LOADER: Options = {
    "--small": _text("data set of small images, e.g. CIFAR-10; the digits by default"),
    "--large": _text("folder data set of photographs, or a tar of them"),
    "--batch_size": {"type": int, "default": 64, "help": "images of a batch"},
    "--workers": {"type": int | None, "default": None, "help": "threads or processes; all usable cores by default"},
}
BUDGET: Options = {
    "--teacher": {"type": str, "required": True, "help": "name of the teacher's network"},
    "--student": {"type": str, "required": True, "help": "name of the student's network"},
    "--image_size": {"type": int, "default": 32, "help": "side of the images, in pixels"},
    "--batch_size": {"type": int, "default": 128, "help": "images of a batch"},
    "--classes": {"type": int, "default": 10, "help": "number of classes"},
    "--optimizer": {"type": Literal["adamw", "sgd"], "default": "adamw", "help": "what updates the student"},
    "--device_profile": {"type": str, "default": "h100", "help": "a100, h100 or a JSON file of published speeds"},
    "--fold_teacher": {"type": str, "default": "auto", "help": "auto (on, as on a GPU), on or off"},
}
END_TO_END: Options = {
    "--data": {"type": str, "required": True, "help": "data set, as `stablekd distill` takes it"},
    "--teacher": {"type": str, "required": True, "help": "name of the teacher's network"},
    "--teacher_weights": {"type": str, "required": True, "help": "file with the teacher's weights"},
    "--student": {"type": str, "required": True, "help": "name of the student's network"},
    "--goal": {"type": str, "default": "kd:40", "help": "METHOD:EPOCHS whose accuracy is to be reached"},
    "--methods": {"type": str, "default": "ce,kd+features,blocks,stablekd", "help": "with commas between"},
    "--budgets": {"type": str, "default": "2,4,8,16", "help": "epochs to try, in turn; the goal's come last"},
    "--tuning": _text("tuning.json of stablekd_fast.bench.campaigns.accuracy"),
    "--subset": {"type": float | None, "default": None, "help": "training images, a number or a share; all by default"},
    "--validation": {"type": float, "default": 0, "help": "images held out of training, a number or a share"},
    "--batch_size": {"type": int, "default": 64, "help": "images of a batch"},
    "--precision": {"type": Literal["fp32", "bf16"], "default": "fp32", "help": "number format of the engine's runs"},
    "--remember": _text("where to keep the teacher's outputs between runs"),
    "--seeds": {"type": int, "default": 3, "help": "runs of each setting"},
    "--out": {"type": str, "required": True, "help": "folder of the runs; finished ones are read, not done again"},
}

BENCHES = {
    "kernels": Bench(
        "operators against eager and compiled PyTorch, and against the speed of memory",
        KERNELS, _bench_kernels, rounds=15, short=("--rounds", "1"),
    ),
    "cache": Bench(
        "rows read in random order, against memory, the disk, and one file per sample",
        {**DIRECTORY, "--quick": _flag("few rows")}, _bench_cache, rounds=11, short=("--rounds", "1", "--quick"),
    ),
    "teacher": Bench(
        "blocks fed by prefixes run again, by one relayed pass, and by the cache",
        {**DIRECTORY, **IMAGES}, _bench_teacher, rounds=9, short=("--rounds", "1"),
    ),
    "step": Bench(
        "whole training steps in every mode, against the usual loops",
        STEP, _bench_step, rounds=9, short=("--rounds", "1"),
    ),
    "objectives": Bench(
        "what the losses of each method add to a step that learns from labels alone",
        {
            "--data": {"type": str, "required": True, "help": "data set of 32 px images, e.g. CIFAR-10"},
            "--precision": {"type": str, "default": "fp32", "help": "fp32 or bf16"},
            "--device": {"type": str, "default": "cpu", "help": "cpu or cuda"},
        },
        _bench_objectives, rounds=9, short=("--rounds", "1"),
    ),
    "budget": Bench(
        "kernels, bytes and predicted time of a step on a GPU, counted without one",
        BUDGET, _bench_budget, short=("--batch-size", "8"),
    ),
    "plan": Bench(
        "runs as planned under several budgets, against their predictions",
        {**DIRECTORY, "--data": {"type": str, "required": True, "help": "data set of 32 px images, e.g. CIFAR-10"}},
        _bench_plan, rounds=1,
    ),
    "loader": Bench(
        "images per second of every source, against torchvision's DataLoader and the bare decoder",
        LOADER, _bench_loader, rounds=9, short=("--rounds", "1", "--workers", "1"),
    ),
    "dropin": Bench(
        "losses and whole objectives of other repositories, with their losses and with ours",
        {
            **DIRECTORY,
            "--data": _text("small images, e.g. CIFAR-10; random ones by default"),
            "--quick": _flag("few steps of small networks"),
        },
        _bench_dropin, rounds=5, short=("--rounds", "1", "--quick"),
    ),
    "own-loop": Bench(
        "StableKD in a loop of one's own: written by hand, by Blockwise, and by it with a kept teacher",
        {
            **DIRECTORY,
            "--data": _text("small images, e.g. CIFAR-10; random ones by default"),
            "--quick": _flag("few steps of small networks"),
        },
        _bench_own_loop, rounds=5, short=("--rounds", "1", "--quick"),
    ),
    "end-to-end": Bench(
        "epochs, steps and wall seconds until each method reaches one accuracy",
        END_TO_END, _bench_end_to_end, rounds=9, short=("--rounds", "1"),
    ),
    "trust": Bench(
        "what runs survive: kills, refused calls, power loss, flipped bytes, long use",
        {
            "--out": {"type": str, "required": True, "help": "folder of the trials; what is there is not tried again"},
            "--lines": _text("kills, terms, calls, power, flips, soak, with commas between; all by default"),
            "--short": _flag("few trials of each, three minutes in all"),
        },
        _bench_trust, short=("--short",),
    ),
    "show": Bench(
        "the rows of an earlier --json: as tables, as a page, beside another file",
        {"file": {"type": str, "help": "file of an earlier --json"}}, _show_file,
    ),
}  # fmt: skip
