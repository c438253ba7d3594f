"""`stablekd cache ...`"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from stablekd_fast.cli.options import fields_of, listed
from stablekd_fast.cli.spelling import Parser
from stablekd_fast.config import DistillConfig
from stablekd_fast.errors import StableKDError
from stablekd_fast.report.terminal import console, print_rows


def run(options: Namespace) -> int:
    """Run the command that was chosen."""
    return COMMANDS[options.what](options[options.what])


def _cache_info(options: Namespace) -> int:
    from stablekd_fast.cache.maintain import describe

    rows, damaged = describe(Path(options.directory))
    made_from = ("teacher", "data", "view_seed", "batch_size")
    print_rows(options.directory, [{k: v for k, v in row.items() if k not in made_from} for row in rows])
    print_rows("made from", [{k: row[k] for k in ("column", *made_from)} for row in rows])
    if damaged:
        raise StableKDError("\n".join(damaged))
    return 0


def _cache_verify(options: Namespace) -> int:
    from stablekd_fast.cache.maintain import verify

    whole, damaged = verify(Path(options.directory))
    if whole:
        print_rows("whole", [{"column": name, "rows": rows} for name, rows in whole.items()])
    if damaged:
        raise StableKDError("\n".join(damaged))
    return 0


def _cache_gc(options: Namespace) -> int:
    from stablekd_fast.cache.maintain import collect

    if not options.columns and not options.half_filled:
        raise StableKDError("Nothing was named to delete; give --columns NAME,NAME or --half-filled.")
    deleted = collect(Path(options.directory), listed(options.columns), half_filled=options.half_filled)
    for name in deleted:
        console.print(f"deleted {name}", highlight=False)
    return 0


def _cache_build(options: Namespace) -> int:
    from stablekd_fast.run.distiller import Distiller

    distiller = Distiller(DistillConfig(**fields_of(options)))
    stored = distiller.build_cache()
    if not distiller.ranks.is_first:
        return 0
    if not stored:
        console.print("The plan keeps nothing; give --cache.plan all to keep everything that is used.", highlight=False)
        return 0
    print_rows("stored", [{"column": name, "rows": rows} for name, rows in stored.items()])
    return 0


COMMANDS = {"info": _cache_info, "verify": _cache_verify, "gc": _cache_gc, "build": _cache_build}


def add_commands(cache: Parser) -> dict[str, Parser]:
    """Add the subcommands; return their parsers by name."""
    chosen = cache.add_subcommands(required=True, dest="what")
    caches = {name: Parser() for name in COMMANDS}
    for name in ("info", "verify", "gc"):
        caches[name].add_argument("directory", type=str, help="the --cache.directory of a run")
    caches["gc"].add_argument("--columns", type=str | None, default=None, help="columns to delete, with commas between")
    caches["gc"].add_argument(
        "--half_filled", action="store_true", help="delete shards that an interrupted run left half filled"
    )
    caches["build"].add_argument("--config", action="config", help="YAML file with any of these settings")
    caches["build"].add_class_arguments(DistillConfig)
    helps = {
        "info": "columns, rows, bytes, and what they were made from",
        "verify": "read every row and compare its checksum",
        "gc": "delete columns, or what interrupted runs left half filled",
        "build": "store what a run would keep, before it",
    }
    for name, parser in caches.items():
        chosen.add_subcommand(name, parser, help=helps[name])
    return caches
