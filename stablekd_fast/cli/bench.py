"""`stablekd bench ...`"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from jsonargparse import Namespace

from stablekd_fast.cli.benches import BENCHES
from stablekd_fast.cli.options import listed
from stablekd_fast.cli.spelling import Parser
from stablekd_fast.errors import ConfigError, StableKDError
from stablekd_fast.report.terminal import console, print_rows

WITHOUT_EFFECT = ("json", "csv", "html", "against", "fail_below", "directory", "out", "trace")
"""Options that say where things are put, not what is measured."""


def add_commands(bench: Parser) -> dict[str, Parser]:
    """Add a subcommand for each bench; return their parsers by name."""
    chosen, parsers = bench.add_subcommands(required=True, dest="name"), {}
    for name, one in BENCHES.items():
        parsers[name] = one.parser()
        chosen.add_subcommand(name, parsers[name], help=one.help)
    return parsers


def run(options: Namespace) -> int:
    """Run the bench that was chosen; return 1 if something fell below what was asked for."""
    name, asked = options.name, options[options.name]
    if "rounds" in asked and asked.rounds < 1:
        raise ConfigError(f"rounds={asked.rounds} was given; it must be at least 1.")
    if name == "kernels" and (asked.aot or asked.every_variant):
        return _prove_kernels(asked)
    return _measure(name, asked)


def _measure(name: str, asked: Namespace) -> int:
    """Run a bench, show its tables and keep what it found.

    Raises StableKDError after that if results were wrong.
    """
    from stablekd_fast.bench.against import compare, fallen
    from stablekd_fast.bench.output import document, read_json, table

    earlier = read_json(Path(asked.against)) if asked.against else None

    def compared(rows: list[dict]) -> list[dict]:
        return rows if earlier is None else compare(rows, earlier["rows"])

    measured = BENCHES[name].run(asked, lambda rows: console.print(table(compared(rows))))
    for title, rows in measured.tables.items():
        if rows:
            print_rows(title, rows)
    content = {"rows": compared(measured.rows), "tables": measured.tables}
    found = {**document(content, {**_settings(name, asked), **measured.settings}), **measured.origin}
    _keep(found, asked, earlier)
    if measured.refused:
        raise StableKDError("\n".join(measured.refused))
    return _exit_code([] if asked.fail_below is None else fallen(found["rows"], asked.fail_below))


def _keep(found: dict, asked: Namespace, earlier: dict | None) -> None:
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


def _settings(name: str, asked: Namespace) -> dict:
    """Return what every bench records: the command, with bare names of files and folders, seeds and rounds."""
    from stablekd_fast.bench.core import SEED

    words, defaults = ["stablekd", "bench", name], BENCHES[name].parser().get_defaults()
    for option, value in vars(asked).items():
        if option not in WITHOUT_EFFECT and value != defaults[option]:
            flag = f"--{'no-' if value is False else ''}{option.replace('_', '-')}"
            words += [flag] if isinstance(value, bool) else [flag, Path(str(value)).name]
    seeds = list(range(asked.seeds)) if "seeds" in asked else [SEED]
    return {"command": shlex.join(words), "seeds": seeds, **({"rounds": asked.rounds} if "rounds" in asked else {})}


def _prove_kernels(asked: Namespace) -> int:
    """Show what is proved without a GPU; return 1 if a kernel spills, is narrower than promised or moves too much."""
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
