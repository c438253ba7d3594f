"""`stablekd bench ...`"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jsonargparse

from stablekd_fast.cli.options import listed
from stablekd_fast.errors import ConfigError, StableKDError
from stablekd_fast.report.terminal import console, print_rows

if TYPE_CHECKING:
    from stablekd_fast.bench.core import Measured

Show = Callable[[list[dict]], None]


def run(options) -> int:
    """1 if something fell below what was asked for."""
    name, asked = options.name, options[options.name]
    if "rounds" in asked and asked.rounds < 1:
        raise ConfigError(f"rounds={asked.rounds} was given; it must be at least 1.")
    if name == "kernels" and (asked.aot or asked.every_variant):
        return _prove_kernels(asked)
    return _measure(name, asked)


def _measure(name: str, asked) -> int:
    """Run a bench, show its tables and keep what it found. Raises StableKDError, after that, for results that were
    wrong."""
    from stablekd_fast.bench.against import compare, fallen
    from stablekd_fast.bench.output import document, read_json, table

    earlier = read_json(Path(asked.against)) if asked.against else None
    compared = lambda rows: rows if earlier is None else compare(rows, earlier["rows"])  # noqa: E731
    measured = COMMANDS[name](asked, lambda rows: console.print(table(compared(rows))))
    for title, rows in measured.tables.items():
        if rows:
            print_rows(title, rows)
    content = {"rows": compared(measured.rows), "tables": measured.tables}
    found = {**document(content, {**_settings(name, asked), **measured.settings}), **measured.origin}
    _keep(found, asked, earlier)
    if measured.refused:
        raise StableKDError("\n".join(measured.refused))
    return _exit_code([] if asked.fail_below is None else fallen(found["rows"], asked.fail_below))


def _keep(found: dict, asked, earlier: dict | None) -> None:
    """Write the files that were asked for."""
    from stablekd_fast.bench.against import differences
    from stablekd_fast.bench.output import write_csv, write_json
    from stablekd_fast.bench.report import write_bench_report

    warnings = [] if earlier is None else differences(found, earlier)
    if warnings:
        print(f"The run in {asked.against} differs: {'; '.join(warnings)}.", file=sys.stderr)
    if asked.json:
        write_json(Path(asked.json), found)
    if asked.csv:
        write_csv(Path(asked.csv), found)
    if asked.html:
        write_bench_report(Path(asked.html), found, warnings)


def _exit_code(faults: list[str]) -> int:
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _settings(name: str, asked) -> dict:
    """What every bench records: the command, with bare names of files and folders, seeds and rounds."""
    from stablekd_fast.bench.core import SEED

    words, defaults = ["stablekd", "bench", name], _parsers()[name].get_defaults()
    for option, value in vars(asked).items():
        if option not in WITHOUT_EFFECT and value != defaults[option]:
            flag = f"--{'no-' if value is False else ''}{option.replace('_', '-')}"
            words += [flag] if isinstance(value, bool) else [flag, Path(str(value)).name]
    seeds = list(range(asked.seeds)) if "seeds" in asked else [SEED]
    return {"command": shlex.join(words), "seeds": seeds, **({"rounds": asked.rounds} if "rounds" in asked else {})}


WITHOUT_EFFECT = ("json", "csv", "html", "against", "fail_below", "directory", "out", "trace")
"""Options that say where things are put, not what is measured."""


def _bench_kernels(asked, show: Show) -> Measured:
    from stablekd_fast.bench.operators.kernels import Setting, run_kernels

    setting = Setting(asked.device, asked.compile, asked.quick)
    return run_kernels(setting, listed(asked.ops), rounds=asked.rounds, threads=asked.threads, show=show)


def _prove_kernels(asked) -> int:
    """1 if a kernel spills, is narrower than promised or moves too much."""
    from stablekd_fast.bench.operators.proof import kernel_table, prove, traffic_table
    from stablekd_fast.bench.output import write_document

    if asked.csv or asked.html or asked.against or asked.fail_below is not None:
        raise ConfigError("--aot measures no time; of the files and comparisons it takes --json only.")
    proof = prove(listed(asked.ops), asked.every_variant)
    console.print(kernel_table(proof.compiled))
    console.print(traffic_table(proof.moved))
    if asked.json:
        write_document(Path(asked.json), {"compiled": proof.compiled, "traffic": proof.moved}, {})
    return _exit_code(proof.faults)


def _bench_cache(asked, show: Show) -> Measured:
    from stablekd_fast.bench.runs.cache import run_cache

    return run_cache(Path(asked.directory), asked.rounds, show, asked.quick)


def _bench_teacher(asked, show: Show) -> Measured:
    from stablekd_fast.bench.runs.teacher import Images, run_teacher

    return run_teacher(Path(asked.directory), Images(asked.small, asked.large), asked.rounds, show)


def _bench_step(asked, show: Show) -> Measured:
    from stablekd_fast.bench.runs.profile import profile_steps
    from stablekd_fast.bench.runs.step import run_step
    from stablekd_fast.bench.runs.teacher import Images

    images, directory = Images(asked.small, asked.large), Path(asked.directory)
    if asked.profile or asked.trace:
        return profile_steps(directory, images, Path(asked.trace) if asked.trace else None)
    return run_step(directory, images, asked.rounds, asked.compile, show)


def _bench_plan(asked, show: Show) -> Measured:
    from stablekd_fast.bench.runs.plan import run_plan

    return run_plan(Path(asked.directory), asked.data, show, asked.rounds)


def _bench_loader(asked, show: Show) -> Measured:
    from stablekd_fast.bench.runs.loader import run_loader

    return run_loader(asked.small, asked.large, asked.rounds, show, batch_size=asked.batch_size, workers=asked.workers)


def _bench_dropin(asked, show: Show) -> Measured:
    from stablekd_fast.bench.runs.dropin import run_dropin

    return run_dropin(Path(asked.directory), asked.data, asked.rounds, show, quick=asked.quick)


def _bench_end_to_end(asked, show: Show) -> Measured:
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


def _show_file(asked, show: Show) -> Measured:
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


COMMANDS = {
    "kernels": _bench_kernels,
    "cache": _bench_cache,
    "teacher": _bench_teacher,
    "step": _bench_step,
    "plan": _bench_plan,
    "loader": _bench_loader,
    "dropin": _bench_dropin,
    "end-to-end": _bench_end_to_end,
    "show": _show_file,
}

ROUNDS = {"kernels": 15, "cache": 11, "teacher": 9, "step": 9, "plan": 1, "loader": 9, "dropin": 5, "end-to-end": 9}

HELPS = {
    "end-to-end": "epochs, steps and wall seconds until each method reaches one accuracy",
    "loader": "images per second of every source, against torchvision's DataLoader and the bare decoder",
    "kernels": "operators against eager and compiled PyTorch, and against the speed of memory",
    "cache": "rows read in random order, against memory, the disk, and one file per sample",
    "dropin": "losses and whole objectives of other repositories, with their losses and with ours",
    "plan": "runs as planned under several budgets, against their predictions",
    "step": "whole training steps in every mode, against the usual loops",
    "teacher": "blocks fed by prefixes run again, by one relayed pass, and by the cache",
    "show": "the rows of an earlier --json: as tables, as a page, beside another file",
}


def add_commands(bench: jsonargparse.ArgumentParser) -> dict[str, jsonargparse.ArgumentParser]:
    chosen, benches = bench.add_subcommands(required=True, dest="name"), _parsers()
    for name, parser in benches.items():
        chosen.add_subcommand(name, parser, help=HELPS[name])
    return benches


def _parsers() -> dict[str, jsonargparse.ArgumentParser]:
    benches = {name: jsonargparse.ArgumentParser(exit_on_error=False) for name in COMMANDS}
    _add_kernels(benches["kernels"])
    _add_networks(benches)
    _add_loader(benches["loader"])
    _add_end_to_end(benches["end-to-end"])
    benches["show"].add_argument("file", type=str, help="file of an earlier --json")
    for name, parser in benches.items():
        _add_output(parser, ROUNDS.get(name))
    return benches


def _add_output(parser: jsonargparse.ArgumentParser, rounds: int | None) -> None:
    """What all benches take."""
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--json", type=str | None, default=None, help="file for rows, machine, versions, settings and commit"
    )
    parser.add_argument("--csv", type=str | None, default=None, help="file for the same, one line per row")
    parser.add_argument(
        "--html", type=str | None, default=None, help="file for a page with plots, which needs nothing else"
    )
    parser.add_argument("--against", type=str | None, default=None, help="file of an earlier --json to compare with")
    least = (
        "exit code 1 if a ratio to the baseline is below this; with --against: "
        "if it is below this share of the earlier one"
    )
    parser.add_argument("--fail_below", type=float | None, default=None, help=least)


def _add_kernels(parser: jsonargparse.ArgumentParser) -> None:
    parser.add_argument("--ops", type=str | None, default=None, help="operators, with commas between; all by default")
    parser.add_argument("--device", type=str, default="cpu")
    parser.add_argument("--compile", action=jsonargparse.ActionYesNo, default=True, help="torch.compile as a rival too")
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--aot", action="store_true", help="no timing: compile for GPUs, and count bytes")
    parser.add_argument("--every_variant", action="store_true", help="with --aot: all variants, which takes hours")
    parser.add_argument("--threads", type=int | None, default=None, help="all usable cores by default")


def _add_networks(benches: dict[str, jsonargparse.ArgumentParser]) -> None:
    """Of the benches that put rows into files, most of them with two networks on real images."""
    for name in ("cache", "teacher", "step", "plan", "dropin"):
        benches[name].add_argument(
            "--directory", type=str, default=".", help="where rows are put for the time of the bench"
        )
    benches["cache"].add_argument("--quick", action="store_true", help="few rows")
    benches["dropin"].add_argument(
        "--data", type=str | None, default=None, help="small images, e.g. CIFAR-10; random ones by default"
    )
    benches["dropin"].add_argument("--quick", action="store_true", help="few steps of small networks")
    benches["plan"].add_argument("--data", type=str, required=True, help="data set of 32 px images, e.g. CIFAR-10")
    for name in ("teacher", "step"):
        benches[name].add_argument(
            "--small", type=str | None, default=None, help="data set of 32 px images, e.g. CIFAR-10"
        )
        benches[name].add_argument("--large", type=str | None, default=None, help="folder data set of photographs")
    step = benches["step"]
    step.add_argument("--compile", action=jsonargparse.ActionYesNo, default=True, help="compiled steps too")
    step.add_argument("--profile", action="store_true", help="where the time of a step goes, instead")
    step.add_argument("--trace", type=str | None, default=None, help="file for a Chrome trace of a profiled step")


def _add_loader(parser: jsonargparse.ArgumentParser) -> None:
    parser.add_argument(
        "--small", type=str | None, default=None, help="data set of small images, e.g. CIFAR-10; the digits by default"
    )
    parser.add_argument(
        "--large", type=str | None, default=None, help="folder data set of photographs, or a tar of them"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--workers", type=int | None, default=None, help="threads or processes; all usable cores by default"
    )


def _add_end_to_end(parser: jsonargparse.ArgumentParser) -> None:
    for name in ("data", "teacher", "teacher_weights", "student"):
        parser.add_argument(f"--{name}", type=str, required=True)
    parser.add_argument("--goal", type=str, default="kd:40", help="METHOD:EPOCHS whose accuracy is to be reached")
    parser.add_argument("--methods", type=str, default="ce,kd+features,blocks,stablekd", help="with commas between")
    parser.add_argument("--budgets", type=str, default="2,4,8,16", help="epochs to try, in turn; the goal's come last")
    parser.add_argument(
        "--tuning", type=str | None, default=None, help="tuning.json of stablekd_fast.bench.campaigns.accuracy"
    )
    parser.add_argument("--subset", type=float | None, default=None)
    parser.add_argument("--validation", type=float, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="of the engine's runs")
    parser.add_argument(
        "--remember", type=str | None, default=None, help="where to keep the teacher's outputs between runs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=str, required=True, help="folder of the runs; finished ones are read, not done again"
    )
