"""The `stablekd` command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse

from stablekd_fast import __version__
from stablekd_fast.cli import bench, cache, diagnose
from stablekd_fast.cli.configs import option_with_nul
from stablekd_fast.cli.options import fields_of
from stablekd_fast.cli.spelling import Parser, explained, reason_of, underscored
from stablekd_fast.config import DistillConfig
from stablekd_fast.errors import ConfigError, Interrupted, StableKDError, printable
from stablekd_fast.execution.memory import keep_freed_memory
from stablekd_fast.execution.moments import given_up
from stablekd_fast.files import write_atomically
from stablekd_fast.planning.pair import PairPlan, plan_pair, plan_ranks
from stablekd_fast.report.terminal import console, print_rows


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. Errors on purpose are one sentence on stderr and exit code 2."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)  # before arguments are added
    parser, commands = _parser()
    words = [underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        settings = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        print(f"stablekd: {explained(error, commands, words)}", file=sys.stderr)
        return 2
    if settings.command is None:
        parser.print_help()
        return 2
    keep_freed_memory()
    try:
        options = _instantiated(commands[settings.command], settings[settings.command])
        spoiled = option_with_nul(options)
        if spoiled is not None:
            raise ConfigError(f"{spoiled} holds a NUL character, which no name and no path can; leave it out.")
        return RUN[settings.command](options)
    except Interrupted as error:
        print(f"stablekd: {error}", file=sys.stderr)
        return 128 + error.signal
    except StableKDError as error:
        print(f"stablekd: {error}", file=sys.stderr)
        return _leave(2) if given_up() else 2
    except OSError as error:
        where = f"{printable(error.filename)[:200]}: " if error.filename else ""
        print(
            f"stablekd: {where}{error.strerror or error}. Check the path, and what may be done there.", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("stablekd: interrupted. --resume continues from the last checkpoint.", file=sys.stderr)
        return 130


def _instantiated(command: Parser, values: jsonargparse.Namespace) -> jsonargparse.Namespace:
    """Make settings of values. Raises ConfigError for those that a setting refuses."""
    try:
        return command.instantiate(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(reason_of(error)) from error


def _leave(code: int) -> int:
    """End the process at once: a GPU that waits for a lost process is waited for at an ordinary exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _demo(options: jsonargparse.Namespace) -> int:
    from stablekd_fast.run.demo import run_demo

    run_demo(Path(options.out), data=options.data, seeds=options.seeds, device=options.device)
    return 0


def _distill(options: jsonargparse.Namespace) -> int:
    from stablekd_fast.run.distiller import Distiller

    config = DistillConfig(**fields_of(options))
    distiller = Distiller(config)
    result = distiller.run()
    if not distiller.ranks.is_first:
        return 0
    _print_reached(f"{result.method}, seed {result.seed}", result.plain())
    console.print(f"Results, report and student: {config.out}", highlight=False)
    return 0


def _evaluate(options: jsonargparse.Namespace) -> int:
    from stablekd_fast.run.exported import evaluate_file, probe_file
    from stablekd_fast.run.probes import probes_named

    path, title = Path(options.weights), f"{options.weights} on the {options.split} split"
    given = {name: getattr(options, name) for name in ("model", "data", "split", "device")}
    if options.probe is not None:
        print_rows(title, probe_file(path, probes_named(options.probe), images=options.probe_images, **given))
        return 0
    if options.probe_images is not None:
        raise ConfigError("--probe-images was given without --probe; give both, e.g. --probe knn,linear.")
    _print_reached(title, asdict(evaluate_file(path, **given)))
    return 0


def _print_reached(title: str, found: dict) -> None:
    """Print what a network reaches; how well it ranks items has a table of its own."""
    ranking = found.pop("ranking", None)
    if found.pop("truth", "labels") == "teacher":
        title += ", held against the teacher"
        found = {"agreement" if name == "accuracy" else name: value for name, value in found.items()}
    print_rows(title, [found])
    if ranking is not None:
        print_rows("Lists of 20 items for each user", [ranking])


def _plan(options: jsonargparse.Namespace) -> int:
    from stablekd_fast.blocks import describe_blocks

    asked = PairPlan(**vars(options))
    paired = asked.paired()
    print_rows(f"{options.teacher} -> {options.student}", [_plan_row(row) for row in describe_blocks(paired)])
    if asked.has_budget:
        found = plan_pair(asked, paired)
        print_rows(f"What is kept of the teacher, per batch of {options.batch_size}", found.decisions)
        print_rows(f"The run, {found.basis}", found.totals)
    if asked.ranks:
        for title, rows in plan_ranks(asked, paired, asked.ranks).items():
            if rows:
                print_rows(title, rows)
            else:
                console.print(f"{title}: none, teacher and student have too few cuts in common.")
    return 0


def _info(options: jsonargparse.Namespace) -> int:
    from stablekd_fast import kernels
    from stablekd_fast.report import machine, versions

    print_rows("machine", [{"what": key, "value": value} for key, value in machine().items()])
    print_rows("versions", [{"what": key, "value": value} for key, value in versions().items()])
    rows = [{"operator": name, **facts} for name, facts in kernels.implementations().items()]
    print_rows("operators", rows)
    claims = _selftest(options.device) if options.selftest else []
    if options.json is not None:
        found = {"machine": machine(), "versions": versions(), "operators": rows, "selftest": claims}
        write_atomically(Path(options.json), (json.dumps(found, indent=1) + "\n").encode())
    broken = [row for row in claims if row["result"] == "fail"]
    if broken:
        words = f"stablekd info --selftest --device {options.device} --json report.json"
        where = f"the file {options.json}" if options.json else f"the file that `{words}` writes"
        console.print(
            f"{len(broken)} of {len(claims)} claims do not hold on this machine. To report it, send {where}: it holds "
            "machine, versions, all rows above, and where each failure arose.",
            highlight=False,
            markup=False,
        )
    return int(bool(broken))


def _selftest(device: str) -> list[dict[str, str]]:
    """Check the claims, print them, and return their rows."""
    from rich.markup import escape

    from stablekd_fast.execution.process import current_device
    from stablekd_fast.run.builders import pick_device
    from stablekd_fast.selftest import selftest

    chosen = pick_device(device)
    with current_device(chosen):
        rows = selftest(chosen)
    shown = [{name: escape(value) for name, value in row.items() if name != "traceback"} for row in rows]
    print_rows(f"self-test on {chosen}", shown)
    return rows


RUN = {
    "demo": _demo,
    "distill": _distill,
    "evaluate": _evaluate,
    "plan": _plan,
    "diagnose": diagnose.run,
    "cache": cache.run,
    "bench": bench.run,
    "info": _info,
}


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="stablekd", description="Blockwise knowledge distillation.", version=__version__)
    chosen = parser.add_subcommands(required=False, dest="command")
    commands = {name: Parser() for name in RUN}

    demo = commands["demo"]
    demo.add_argument("--out", type=str, default="demo", help="directory for results and report")
    demo.add_argument("--data", type=str, default="fashion-mnist-small", help="fashion-mnist-small or digits")
    demo.add_argument("--seeds", type=int, default=3, help="runs of each method")
    demo.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto for what there is")

    commands["distill"].add_argument("--config", action="config", help="YAML file with any of these settings")
    commands["distill"].add_class_arguments(DistillConfig)

    evaluate = commands["evaluate"]
    evaluate.add_argument("weights", type=str, help="student.safetensors, checkpoint.safetensors or a weights file")
    evaluate.add_argument("--data", type=str | None, default=None, help="data set; that of the run by default")
    evaluate.add_argument("--model", type=str | None, default=None, help="model name; that of the run by default")
    evaluate.add_argument("--split", default="test", choices=["test", "train"], help="which images")
    evaluate.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto for what there is")

    evaluate.add_argument("--probe", type=str | None, default=None, help="learn from features: knn, linear, or both")
    evaluate.add_argument("--probe_images", type=int | None, default=None, help="learn from so many; all by default")

    commands["plan"].add_class_arguments(PairPlan)

    diagnose.add_arguments(commands["diagnose"])

    info = commands["info"]
    info.add_argument("--selftest", action="store_true", help="check the essential claims; exit code 1 if one fails")
    info.add_argument("--device", type=str, default="auto", help="device of the self-test: auto, cpu, cuda or cuda:N")
    info.add_argument("--json", type=str | None, default=None, help="file for all that is shown, and for tracebacks")

    helps = {
        "demo": "compare methods on embedded real data",
        "distill": "distil a student (or train a teacher with --method ce)",
        "evaluate": "top-1 and top-5 of a checkpoint, or probes of its features",
        "plan": "show how a pair is cut into blocks, and what of the teacher is worth keeping",
        "diagnose": "measure whether decomposition should help a pair, which cuts, and for how long",
        "cache": "look after the teacher's stored outputs",
        "bench": "measure speed against rivals",
        "info": "machine, versions, and which implementation serves each operator",
    }
    for name, command in commands.items():
        chosen.add_subcommand(name, command, help=helps[name])
    inner = {}
    for name, room in (("bench", bench), ("cache", cache)):
        inner |= {f"{name} {what}": command for what, command in room.add_commands(commands[name]).items()}
    return parser, commands | inner


def _plan_row(row: dict) -> dict:
    """Return a described block in the widths of a terminal. Two values in a cell are teacher / student."""

    def both(name: str, form: Callable[[Any], str]) -> str:
        pair = [form(row[f"{side}_{name}"]) for side in ("teacher", "student")]
        return pair[0] if pair[0] == pair[1] else " / ".join(pair)

    return {
        "block": row["block"] + 1,
        "ends at": both("end", str),
        "shape": both("shape", lambda shape: "x".join(map(str, shape)) if shape else ""),
        "parameters": both("parameters", _short),
        "FLOPs/image": both("flops", _short),
        "bridge": row["bridge"],
        "bytes/image": f"{row['activation_bytes']:,}" if row["activation_bytes"] else None,
    }


def _short(number: int) -> str:
    """Return three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
