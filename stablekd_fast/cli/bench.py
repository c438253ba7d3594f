"""`stablekd bench ...`"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import jsonargparse

from stablekd_fast.cli.show import console, listed, print_rows
from stablekd_fast.errors import StableKDError


def run(options) -> int:
    return COMMANDS[options.name](options[options.name])


def _bench_kernels(options) -> int:
    if options.aot or options.every_variant:
        return _prove_kernels(options)
    from stablekd_fast.bench.kernels import Setting, run_kernels
    from stablekd_fast.bench.output import read_json

    earlier = read_json(Path(options.against))["rows"] if options.against else None
    setting = Setting(options.device, options.compile, options.quick)
    ops = listed(options.ops)
    show = partial(_show_case, earlier=earlier)
    measured = run_kernels(setting, ops, rounds=options.rounds, threads=options.threads, show=show)
    return _keep_measurements(measured, options, earlier)


def _bench_cache(options) -> int:
    from stablekd_fast.bench.cache import run_cache
    from stablekd_fast.bench.output import write_document

    rows, memory, settings = run_cache(Path(options.directory), options.rounds, partial(_show_case, earlier=None), options.quick)
    print_rows("memory over an epoch", [memory])
    if options.json:
        write_document(Path(options.json), {"rows": rows, "memory": memory}, settings)
    return 0


def _bench_teacher(options) -> int:
    from stablekd_fast.bench.output import write_json
    from stablekd_fast.bench.teacher import Images, run_teacher

    show = partial(_show_case, earlier=None)
    rows, settings = run_teacher(Path(options.directory), Images(options.small, options.large), options.rounds, show)
    if options.json:
        write_json(Path(options.json), rows, settings)
    return 0


def _bench_step(options) -> int:
    from stablekd_fast.bench.output import write_document
    from stablekd_fast.bench.profile import profile_steps
    from stablekd_fast.bench.step import run_step
    from stablekd_fast.bench.teacher import Images

    images, directory = Images(options.small, options.large), Path(options.directory)
    if options.profile or options.trace:
        profiles = profile_steps(directory, images, Path(options.trace) if options.trace else None)
        for name, rows in profiles.items():
            print_rows(f"{name}: milliseconds per step", rows)
        measured, settings = {"profile": profiles}, {}
    else:
        show = partial(_show_case, earlier=None)
        measured, settings = run_step(directory, images, options.rounds, options.compile, show)
        print_rows("the engine beside the operations of its networks and losses", measured["overhead"])
        if measured["compiling"]:
            print_rows("compiling", measured["compiling"])
    if options.json:
        write_document(Path(options.json), measured, settings)
    return 0


def _bench_plan(options) -> int:
    from stablekd_fast.bench.output import write_document
    from stablekd_fast.bench.plan import run_plan

    def show(row: dict) -> None:
        print_rows(f"budget {row['budget']}, round {row['round']}", [row])

    rows, settings = run_plan(Path(options.directory), options.data, show, options.rounds)
    if options.json:
        write_document(Path(options.json), {"rows": rows}, settings)
    return 0


def _bench_loader(options) -> int:
    from stablekd_fast.bench.loader import run_loader
    from stablekd_fast.bench.output import write_json

    show = partial(_show_case, earlier=None)
    rows, settings = run_loader(options.small, options.large, options.rounds, show, batch_size=options.batch_size, workers=options.workers)
    if options.json:
        write_json(Path(options.json), rows, settings)
    return 0


def _bench_dropin(options) -> int:
    from stablekd_fast.bench.dropin import run_dropin
    from stablekd_fast.bench.output import write_json

    rows, settings = run_dropin(Path(options.directory), options.rounds, partial(_show_case, earlier=None), quick=options.quick)
    if options.json:
        write_json(Path(options.json), rows, settings)
    return 0


def _bench_end_to_end(options) -> int:
    from stablekd_fast.bench.accuracy import tuned_settings
    from stablekd_fast.bench.campaign import Task
    from stablekd_fast.bench.end_to_end import Goal, run_end_to_end
    from stablekd_fast.bench.output import write_document

    task = Task(**{field.name: options[field.name] for field in dataclasses.fields(Task) if field.name in options})
    measured = run_end_to_end(
        task,
        tuned_settings(Path(options.tuning)) if options.tuning else {},
        Goal.parse(options.goal),
        _numbers("budgets", options.budgets),
        listed(options.methods),
        seeds=options.seeds,
        rounds=options.rounds,
        out=Path(options.out),
        show=print_rows,
    )
    if options.json:
        write_document(Path(options.json), measured, {**vars(options), "data": None, "teacher_weights": None})
    return 0


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in listed(text)]
    except ValueError as error:
        raise StableKDError(f"--{name} {text} was given; give numbers with commas between, for instance 2,4,8.") from error


def _prove_kernels(options) -> int:
    """1 if a kernel spills, is narrower than promised or moves too much."""
    from stablekd_fast.bench.output import write_document
    from stablekd_fast.bench.proof import kernel_table, prove, traffic_table

    proof = prove(listed(options.ops), options.every_variant)
    console.print(kernel_table(proof.compiled))
    console.print(traffic_table(proof.moved))
    if options.json:
        write_document(Path(options.json), {"compiled": proof.compiled, "traffic": proof.moved}, {})
    for fault in proof.faults:
        print(fault, file=sys.stderr)
    return 1 if proof.faults else 0


def _show_case(rows: list[dict], earlier: list[dict] | None) -> None:
    from stablekd_fast.bench.output import compare, table

    console.print(table(rows if earlier is None else compare(rows, earlier)))


def _keep_measurements(measured, options, earlier: list[dict] | None) -> int:
    """Write the files that were asked for; 1 if a ratio is below what was asked for."""
    from stablekd_fast.bench.output import below, compare, write_csv, write_json

    rows = measured.rows if earlier is None else compare(measured.rows, earlier)
    if options.json:
        write_json(Path(options.json), rows, measured.settings)
    if options.csv:
        write_csv(Path(options.csv), rows)
    if measured.refused:
        raise StableKDError("\n".join(measured.refused))
    slow = [] if options.fail_below is None else below(rows, "stablekd", options.fail_below)
    for row in slow:
        print(f"{row['case']}: {row['ratio']:.2f} times {row['baseline']}, below {options.fail_below}", file=sys.stderr)
    return 1 if slow else 0


COMMANDS = {
    "kernels": _bench_kernels,
    "cache": _bench_cache,
    "teacher": _bench_teacher,
    "step": _bench_step,
    "plan": _bench_plan,
    "loader": _bench_loader,
    "dropin": _bench_dropin,
    "end-to-end": _bench_end_to_end,
}


def add_commands(bench: jsonargparse.ArgumentParser) -> dict[str, jsonargparse.ArgumentParser]:
    chosen = bench.add_subcommands(required=True, dest="name")
    benches = {name: jsonargparse.ArgumentParser(exit_on_error=False) for name in COMMANDS}

    kernels = benches["kernels"]
    kernels.add_argument("--ops", type=str | None, default=None, help="operators, with commas between; all by default")
    kernels.add_argument("--device", type=str, default="cpu")
    kernels.add_argument("--compile", action=jsonargparse.ActionYesNo, default=True, help="torch.compile as a rival too")
    kernels.add_argument("--quick", action="store_true", help="a few small cases")
    kernels.add_argument("--aot", action="store_true", help="no timing: compile for GPUs, and count bytes")
    kernels.add_argument("--every_variant", action="store_true", help="with --aot: all variants, which takes hours")
    kernels.add_argument("--threads", type=int | None, default=None, help="all usable cores by default")
    kernels.add_argument("--rounds", type=int, default=15)
    kernels.add_argument("--json", type=str | None, default=None, help="file for rows, machine, versions and settings")
    kernels.add_argument("--csv", type=str | None, default=None, help="file for the rows")
    kernels.add_argument("--against", type=str | None, default=None, help="file of an earlier --json to compare with")
    kernels.add_argument("--fail_below", type=float | None, default=None, help="exit code 1 for a ratio below this")

    for name, rounds in (("cache", 11), ("teacher", 9), ("step", 9), ("plan", 1), ("dropin", 5)):
        benches[name].add_argument("--rounds", type=int, default=rounds)
    for name in ("cache", "teacher", "step", "plan", "dropin"):
        benches[name].add_argument("--directory", type=str, default=".", help="where rows are put for the time of the bench")
        benches[name].add_argument("--json", type=str | None, default=None, help="file for rows, machine and versions")
    benches["cache"].add_argument("--quick", action="store_true", help="few rows")
    benches["dropin"].add_argument("--quick", action="store_true", help="few steps of small networks")
    benches["plan"].add_argument("--data", type=str, required=True, help="data set of 32 px images, e.g. CIFAR-10")
    for name in ("teacher", "step"):
        benches[name].add_argument("--small", type=str | None, default=None, help="data set of 32 px images, e.g. CIFAR-10")
        benches[name].add_argument("--large", type=str | None, default=None, help="folder data set of photographs")
    step = benches["step"]
    step.add_argument("--compile", action=jsonargparse.ActionYesNo, default=True, help="compiled steps too")
    step.add_argument("--profile", action="store_true", help="where the time of a step goes, instead")
    step.add_argument("--trace", type=str | None, default=None, help="file for a Chrome trace of a profiled step")

    loader = benches["loader"]
    loader.add_argument("--small", type=str | None, default=None, help="data set of small images, e.g. CIFAR-10; the digits by default")
    loader.add_argument("--large", type=str | None, default=None, help="folder data set of photographs, or a tar of them")
    loader.add_argument("--batch_size", type=int, default=64)
    loader.add_argument("--workers", type=int | None, default=None, help="threads or processes; all usable cores by default")
    loader.add_argument("--rounds", type=int, default=9)
    loader.add_argument("--json", type=str | None, default=None, help="file for rows, machine, versions and settings")

    _add_end_to_end(benches["end-to-end"])

    helps = {
        "end-to-end": "epochs, steps and wall seconds until each method reaches one accuracy",
        "loader": "images per second of every source, against torchvision's DataLoader and the bare decoder",
        "dropin": "losses and whole objectives of other repositories, with their losses and with ours",
        "kernels": "operators against eager and compiled PyTorch, and against the speed of memory",
        "cache": "rows read in random order, against memory, the disk, and one file per sample",
        "plan": "runs as planned under several budgets, against their predictions",
        "step": "whole training steps in every mode, against the usual loops",
        "teacher": "blocks fed by prefixes run again, by one relayed pass, and by the cache",
    }
    for name, parser in benches.items():
        chosen.add_subcommand(name, parser, help=helps[name])
    return benches


def _add_end_to_end(parser: jsonargparse.ArgumentParser) -> None:
    for name in ("data", "teacher", "teacher_weights", "student"):
        parser.add_argument(f"--{name}", type=str, required=True)
    parser.add_argument("--goal", type=str, default="kd:40", help="METHOD:EPOCHS whose accuracy is to be reached")
    parser.add_argument("--methods", type=str, default="ce,kd+features,blocks,stablekd", help="with commas between")
    parser.add_argument("--budgets", type=str, default="2,4,8,16", help="epochs to try, in turn; the goal's come last")
    parser.add_argument("--tuning", type=str | None, default=None, help="tuning.json of stablekd_fast.bench.accuracy")
    parser.add_argument("--subset", type=float | None, default=None)
    parser.add_argument("--validation", type=float, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="of the engine's runs")
    parser.add_argument("--remember", type=str | None, default=None, help="where to keep the teacher's outputs between runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=str, required=True, help="folder of the runs; finished ones are read, not done again")
    parser.add_argument("--json", type=str | None, default=None, help="file for all tables, machine and versions")
