"""The `stablekd` command."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jsonargparse
from rich.console import Console
from rich.table import Table

from stablekd_fast import __version__
from stablekd_fast.config import DistillConfig
from stablekd_fast.errors import StableKDError
from stablekd_fast.memory import keep_freed_memory
from stablekd_fast.plan_pair import PairPlan

console = Console()


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors on purpose are one sentence on stderr and exit code 2."""
    parser, commands = _parser()
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    words = [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        settings = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        print(f"stablekd: {_with_nearest(str(error), commands, words)}", file=sys.stderr)
        return 2
    if settings.command is None:
        parser.print_help()
        return 2
    keep_freed_memory()
    options = commands[settings.command].instantiate(settings[settings.command])
    try:
        return RUN[settings.command](options)
    except StableKDError as error:
        print(f"stablekd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stablekd: interrupted. --resume continues from the last checkpoint.", file=sys.stderr)
        return 130


def _demo(options) -> int:
    from stablekd_fast.demo import run_demo

    run_demo(Path(options.out), seeds=options.seeds, device=options.device)
    return 0


def _distill(options) -> int:
    from stablekd_fast.distiller import Distiller

    config = DistillConfig(**_fields(options))
    result = Distiller(config).run()
    _print_rows(f"{result.method}, seed {result.seed}", [asdict(result)])
    console.print(f"Results, report and student: {config.out}", highlight=False)
    return 0


def _evaluate(options) -> int:
    from stablekd_fast.evaluate import evaluate_file

    metrics = evaluate_file(
        Path(options.weights), model=options.model, data=options.data, split=options.split, device=options.device
    )
    _print_rows(f"{options.weights} on the {options.split} split", [asdict(metrics)])
    return 0


def _plan(options) -> int:
    from stablekd_fast.blocks import describe_blocks
    from stablekd_fast.plan_pair import plan_pair

    asked = PairPlan(**vars(options))
    paired = asked.paired()
    _print_rows(f"{options.teacher} -> {options.student}", [_plan_row(row) for row in describe_blocks(paired)])
    if asked.has_budget:
        found = plan_pair(asked, paired)
        _print_rows(f"What is kept of the teacher, per batch of {options.batch_size}", found.decisions)
        _print_rows(f"The run, {found.basis}", found.totals)
    return 0


def _cache(options) -> int:
    return CACHE[options.what](options[options.what])


def _cache_info(options) -> int:
    from stablekd_fast.cache.maintain import describe

    rows = describe(Path(options.directory))
    made_from = ("teacher", "data", "view_seed", "batch_size")
    _print_rows(options.directory, [{k: v for k, v in row.items() if k not in made_from} for row in rows])
    _print_rows("made from", [{k: row[k] for k in ("column", *made_from)} for row in rows])
    return 0


def _cache_verify(options) -> int:
    from stablekd_fast.cache.maintain import verify

    whole, damaged = verify(Path(options.directory))
    if whole:
        _print_rows("whole", [{"column": name, "rows": rows} for name, rows in whole.items()])
    if damaged:
        raise StableKDError("\n".join(damaged))
    return 0


def _cache_gc(options) -> int:
    from stablekd_fast.cache.maintain import collect

    if not options.columns and not options.half_filled:
        raise StableKDError("Nothing was named to delete; give --columns NAME,NAME or --half-filled.")
    deleted = collect(Path(options.directory), _listed(options.columns), half_filled=options.half_filled)
    for name in deleted:
        console.print(f"deleted {name}", highlight=False)
    return 0


def _cache_build(options) -> int:
    from stablekd_fast.distiller import Distiller

    stored = Distiller(DistillConfig(**_fields(options))).build_cache()
    if not stored:
        console.print("The plan keeps nothing; give --cache.plan all to keep everything that is used.", highlight=False)
        return 0
    _print_rows("stored", [{"column": name, "rows": rows} for name, rows in stored.items()])
    return 0


def _info(options) -> int:
    from stablekd_fast import kernels
    from stablekd_fast.report import machine, versions

    _print_rows("machine", [{"what": key, "value": value} for key, value in machine().items()])
    _print_rows("versions", [{"what": key, "value": value} for key, value in versions().items()])
    rows = [{"operator": name, **facts} for name, facts in kernels.implementations().items()]
    _print_rows("operators", rows)
    return 0


def _bench(options) -> int:
    return BENCHES[options.name](options[options.name])


def _bench_kernels(options) -> int:
    if options.aot or options.every_variant:
        return _prove_kernels(options)
    from stablekd_fast.bench.kernels import Setting, run_kernels
    from stablekd_fast.bench.output import read_json

    earlier = read_json(Path(options.against))["rows"] if options.against else None
    setting = Setting(options.device, options.compile, options.quick)
    ops = _ops(options)
    show = partial(_show_case, earlier=earlier)
    measured = run_kernels(setting, ops, rounds=options.rounds, threads=options.threads, show=show)
    return _keep_measurements(measured, options, earlier)


def _bench_cache(options) -> int:
    from stablekd_fast.bench.cache import run_cache
    from stablekd_fast.bench.output import write_document

    rows, memory, settings = run_cache(Path(options.directory), options.rounds, partial(_show_case, earlier=None), options.quick)
    _print_rows("memory over an epoch", [memory])
    if options.json:
        write_document(Path(options.json), {"rows": rows, "memory": memory}, settings)
    return 0


def _bench_teacher(options) -> int:
    from stablekd_fast.bench.output import write_json
    from stablekd_fast.bench.teacher import run_teacher

    if not options.small and not options.large:
        raise StableKDError("No images were given; give --small for a data set of 32 px images, --large for photographs.")
    show = partial(_show_case, earlier=None)
    rows, settings = run_teacher(Path(options.directory), options.small, options.large, options.rounds, show)
    if options.json:
        write_json(Path(options.json), rows, settings)
    return 0


def _bench_plan(options) -> int:
    from stablekd_fast.bench.output import write_document
    from stablekd_fast.bench.plan import run_plan

    def show(row: dict) -> None:
        _print_rows(f"budget {row['budget']}, round {row['round']}", [row])

    rows, settings = run_plan(Path(options.directory), options.data, show, options.rounds)
    if options.json:
        write_document(Path(options.json), {"rows": rows}, settings)
    return 0


def _ops(options) -> list[str]:
    return _listed(options.ops)


def _listed(names: str | None) -> list[str]:
    return [name.strip() for name in names.split(",")] if names else []


def _prove_kernels(options) -> int:
    """1 if a kernel spills, is narrower than promised or moves too much."""
    from stablekd_fast.bench.output import write_document
    from stablekd_fast.bench.proof import kernel_table, prove, traffic_table

    proof = prove(_ops(options), options.every_variant)
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


BENCHES = {"kernels": _bench_kernels, "cache": _bench_cache, "teacher": _bench_teacher, "plan": _bench_plan}
CACHE = {"info": _cache_info, "verify": _cache_verify, "gc": _cache_gc, "build": _cache_build}
RUN = {
    "demo": _demo,
    "distill": _distill,
    "evaluate": _evaluate,
    "plan": _plan,
    "cache": _cache,
    "bench": _bench,
    "info": _info,
}


def _parser() -> tuple[jsonargparse.ArgumentParser, dict[str, jsonargparse.ArgumentParser]]:
    parser = jsonargparse.ArgumentParser(
        prog="stablekd", description="Blockwise knowledge distillation.", exit_on_error=False, version=__version__
    )
    chosen = parser.add_subcommands(required=False, dest="command")
    commands = {name: jsonargparse.ArgumentParser(exit_on_error=False) for name in RUN}

    demo = commands["demo"]
    demo.add_argument("--out", type=str, default="demo", help="directory for results and report")
    demo.add_argument("--seeds", type=int, default=3)
    demo.add_argument("--device", type=str, default="auto")

    commands["distill"].add_argument("--config", action="config", help="YAML file with any of these settings")
    commands["distill"].add_class_arguments(DistillConfig)

    evaluate = commands["evaluate"]
    evaluate.add_argument("weights", type=str, help="student.safetensors, checkpoint.safetensors or a weights file")
    evaluate.add_argument("--data", type=str | None, default=None, help="data set; that of the run by default")
    evaluate.add_argument("--model", type=str | None, default=None, help="model name; that of the run by default")
    evaluate.add_argument("--split", type=str, default="test", choices=["test", "train"])
    evaluate.add_argument("--device", type=str, default="auto")

    commands["plan"].add_class_arguments(PairPlan)

    helps = {
        "demo": "compare methods on embedded real data",
        "distill": "distil a student (or train a teacher with --method ce)",
        "evaluate": "top-1 and top-5 of a checkpoint",
        "plan": "show how a pair is cut into blocks, and what of the teacher is worth keeping",
        "cache": "look after the teacher's stored outputs",
        "bench": "measure speed against rivals",
        "info": "machine, versions, and which implementation serves each operator",
    }
    for name, command in commands.items():
        chosen.add_subcommand(name, command, help=helps[name])
    benches = _add_benches(commands["bench"])
    caches = _add_caches(commands["cache"])
    inner = {f"bench {name}": bench for name, bench in benches.items()}
    return parser, commands | inner | {f"cache {name}": cache for name, cache in caches.items()}


def _add_caches(cache: jsonargparse.ArgumentParser) -> dict[str, jsonargparse.ArgumentParser]:
    chosen = cache.add_subcommands(required=True, dest="what")
    caches = {name: jsonargparse.ArgumentParser(exit_on_error=False) for name in CACHE}
    for name in ("info", "verify", "gc"):
        caches[name].add_argument("directory", type=str, help="the --cache.directory of a run")
    caches["gc"].add_argument("--columns", type=str | None, default=None, help="columns to delete, with commas between")
    caches["gc"].add_argument("--half_filled", action="store_true", help="delete shards that a run left half filled")
    caches["build"].add_argument("--config", action="config", help="YAML file with any of these settings")
    caches["build"].add_class_arguments(DistillConfig)
    helps = {
        "info": "columns, rows, bytes, and what they were made from",
        "verify": "read every row and compare its checksum",
        "gc": "delete columns, or what runs left half filled",
        "build": "store what a run would keep, before it",
    }
    for name, parser in caches.items():
        chosen.add_subcommand(name, parser, help=helps[name])
    return caches


def _add_benches(bench: jsonargparse.ArgumentParser) -> dict[str, jsonargparse.ArgumentParser]:
    chosen = bench.add_subcommands(required=True, dest="name")
    benches = {name: jsonargparse.ArgumentParser(exit_on_error=False) for name in BENCHES}

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

    for name, rounds in (("cache", 11), ("teacher", 9), ("plan", 1)):
        benches[name].add_argument("--rounds", type=int, default=rounds)
    for name in ("cache", "teacher", "plan"):
        benches[name].add_argument("--directory", type=str, default=".", help="where rows are put for the time of the bench")
        benches[name].add_argument("--json", type=str | None, default=None, help="file for rows, machine and versions")
    benches["cache"].add_argument("--quick", action="store_true", help="few rows")
    benches["plan"].add_argument("--data", type=str, required=True, help="data set of 32 px images, e.g. CIFAR-10")
    benches["teacher"].add_argument("--small", type=str | None, default=None, help="data set of 32 px images, e.g. CIFAR-10")
    benches["teacher"].add_argument("--large", type=str | None, default=None, help="folder data set of photographs")

    helps = {
        "kernels": "operators against eager and compiled PyTorch, and against the speed of memory",
        "cache": "rows read in random order, against memory, the disk, and one file per sample",
        "plan": "runs as planned under several budgets, against their predictions",
        "teacher": "blocks fed by prefixes run again, by one relayed pass, and by the cache",
    }
    for name, parser in benches.items():
        chosen.add_subcommand(name, parser, help=helps[name])
    return benches


def _fields(options) -> dict:
    values = dict(vars(options))
    values.pop("config", None)
    return values


def _underscored(word: str) -> str:
    """Options may be written with hyphens, as people expect, or with underscores, as in the YAML file."""
    if not word.startswith("--") or len(word) == 2:
        return word
    if word == "--resume":
        return "--resume=true"
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _with_nearest(message: str, commands: dict, words: list[str]) -> str:
    """Add the nearest valid name to a complaint about an unknown one."""
    unknown = re.search(r"--([\w.]+)", message) or re.search(r"option ['\"]([\w.]+)", message)
    command = next((name for name in (" ".join(words[:2]), *words) if name in commands), None)
    if unknown is None or command is None:
        return message
    valid = [action.dest for action in commands[command]._actions if action.dest]
    near = difflib.get_close_matches(unknown.group(1), valid, 1, 0.5)
    if not near or unknown.group(1) in valid:
        return message
    return f"{message} The nearest valid name is {near[0]!r}."


def _plan_row(row: dict) -> dict:
    """A described block in the widths of a terminal; two values are teacher / student."""

    def both(name: str, form) -> str:
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
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _print_rows(title: str, rows: list[dict]) -> None:
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
