"""The mutation campaign: small bugs are put into a copy of the package one at a time, and the tests of the room must
notice.

    python tests/mutation run --room engine     # what is not known yet; --again: everything, --survivors: those only
    python tests/mutation draw --seed 1         # which bugs: once, before the tests are written
    python tests/mutation report                # docs/results/mutation.md

A room's bugs are those that were drawn from all that `operators.py` can make (`drawn.json`), and those that people
thought of (`bugs.toml`). Only tests that run the changed line are run, until one fails. What came of each bug is
appended to `docs/results/mutation/ROOM.jsonl` as it becomes known, so a campaign can be ended and gone on with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tomllib
from operators import Mutant, mutants
from report import write_report
from sandbox import ROOT, Running, Sandbox, warm
from tested import SPARE, Map, make_map, run_tests

HERE, OUTCOMES = Path(__file__).parent, ROOT / "docs" / "results" / "mutation"
ROOMS = tomllib.loads((HERE / "rooms.toml").read_text())
DRAWN = HERE / "drawn.json"


def all_mutants(room: str) -> list[Mutant]:
    """Find every change of a room's sources that can be made."""
    files = sorted(path for source in ROOMS[room]["sources"] for path in (ROOT / source).rglob("*.py"))
    return [one for path in files for one in mutants(str(path.relative_to(ROOT)), path.read_bytes())]


def by_hand(room: str) -> list[Mutant]:
    """Find the bugs that people thought of, in a room."""
    found = []
    for bug in tomllib.loads((HERE / "bugs.toml").read_text()).get(room, []):
        source = (ROOT / bug["path"]).read_bytes()
        start = source.find(bug["before"].encode())
        line = source[:start].count(b"\n") + 1 if start >= 0 else 0
        end = start + len(bug["before"].encode())
        found.append(
            Mutant(bug["path"], "", f"by hand: {bug['kind']}", bug["before"], bug["after"], 0, line, start, end)
        )
    return found


def draw(seed: int, each: int) -> None:
    """Choose each room's bugs, the same for the same seed and sources."""
    if DRAWN.exists():
        sys.exit(f"{DRAWN} exists: what was drawn stays, or the tests were written for other bugs.")
    drawn = {}
    for room in ROOMS:
        possible = all_mutants(room)
        chosen = random.Random(f"{seed} {room}").sample(possible, min(each, len(possible)))
        chosen.sort(key=lambda one: (one.path, one.start))
        drawn[room] = [{key: asdict(one)[key] for key in NAMES} for one in chosen]
    DRAWN.write_text(json.dumps(drawn, indent=1) + "\n")


NAMES = ("path", "function", "operator", "before", "after", "nth")


def chosen_mutants(room: str) -> tuple[list[Mutant], list[dict]]:
    """Find the bugs of a room in the sources of today, and those whose place is gone."""
    there = {one.name: one for one in all_mutants(room)}
    drawn = json.loads(DRAWN.read_text()).get(room, [])
    names = [tuple(one[key] for key in NAMES) for one in drawn]
    found = [there[name] for name in names if name in there]
    hand = by_hand(room)
    gone = [dict(zip(NAMES, name)) for name in names if name not in there]
    gone += [{key: getattr(one, key) for key in NAMES} for one in hand if one.start < 0]
    return found + [one for one in hand if one.start >= 0], gone


def outcomes(room: str) -> dict[tuple, dict]:
    """Read what is known; of several outcomes of a bug the last counts."""
    file = OUTCOMES / f"{room}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return {tuple(row[key] for key in NAMES): row for row in rows}


BUILDING = 600.0
"""Seconds in which the C++ core is built."""


@dataclass
class Trial:
    """A bug that tests are run against."""

    mutant: Mutant
    process: Running
    limit: float
    """Seconds that the tests may take."""
    undo: contextlib.ExitStack
    """Takes the bug out again."""


@dataclass
class Campaign:
    """The bugs of a room, tried in several sandboxes at once."""

    room: str
    folder: Path
    workers: int
    running: dict[int, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sandboxes = [Sandbox(self.folder / f"{self.room}-{number}") for number in range(self.workers)]

    def run(self, asked: list[Mutant]) -> None:
        """Try each, and write what came of it."""
        known = make_map(self.sandboxes[0], ROOMS[self.room], self.folder / f"{self.room}-map")
        print(f"{self.room}: {len(known.seconds)} tests, {sum(known.seconds.values()):.0f} s; {len(asked)} bugs")
        waiting = list(reversed(asked))
        while waiting or self.running:
            for number in range(self.workers):
                if number not in self.running and waiting:
                    self._start(number, waiting.pop(), known)
            for number in list(self.running):
                self._look(number)

    def _start(self, number: int, one: Mutant, known: Map) -> None:
        sandbox, (times, more) = self.sandboxes[number], SPARE
        chosen = known.chosen(one.path, one.line, one.at_import)
        undo = contextlib.ExitStack()
        undo.enter_context(sandbox.changed(one.path, one.apply))
        files = sorted({name.split("::")[0] for name in chosen})
        outcome = sandbox.folder / "outcome.json"
        outcome.unlink(missing_ok=True)
        native = not one.path.endswith(".py")

        def work() -> int:
            return (sandbox.build() if native else 0) or run_tests(files, outcome, chosen)

        limit = times * sum(chosen.values()) + more + native * BUILDING
        self.running[number] = Trial(one, sandbox.start(work, sandbox.folder / "log"), limit, undo)

    def _look(self, number: int) -> None:
        trial = self.running[number]
        one, process = trial.mutant, trial.process
        process.wait(0.2)
        if process.status is None and process.seconds < trial.limit:
            return
        status, seconds = process.status, process.seconds
        process.end()
        trial.undo.close()
        del self.running[number]
        written = self.sandboxes[number].folder / "outcome.json"
        failed = json.loads(written.read_text())["failed"] if written.exists() else []
        by = failed[0] if failed else "no end within its time" if status is None else f"exit status {status}"
        row = {key: getattr(one, key) for key in (*NAMES, "line")}
        row |= {"noticed": status != 0, "by": None if status == 0 else by, "seconds": round(seconds, 1)}
        with (OUTCOMES / f"{self.room}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{'NOT NOTICED' if status == 0 else 'noticed'} {seconds:5.0f} s  "
              f"{one.path}:{one.line} {one.operator}: {' '.join(one.before.split())[:60]}", flush=True)  # fmt: skip


def run(rooms: list[str], again: bool, survivors: bool, folder: Path, workers: int) -> None:
    """Try the bugs of rooms that were asked for."""
    warm()
    OUTCOMES.mkdir(parents=True, exist_ok=True)
    for room in rooms:
        found, gone = chosen_mutants(room)
        known = outcomes(room)
        asked = [
            one for one in found if again or one.name not in known or (survivors and not known[one.name]["noticed"])
        ]
        for one in gone:
            print(f"gone: {one['path']} {one['function']} {one['operator']}: {one['before']}")
        if asked:
            Campaign(room, folder, workers).run(asked)


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python tests/mutation", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsed = commands.add_parser("draw")
    parsed.add_argument("--seed", type=int, required=True)
    parsed.add_argument("--each", type=int, default=32, help="bugs per room of Python")
    parsed = commands.add_parser("run")
    parsed.add_argument("--room", action="append", choices=list(ROOMS), help="all, unless given")
    parsed.add_argument("--again", action="store_true", help="those whose outcome is known, too")
    parsed.add_argument("--survivors", action="store_true", help="those that were not noticed, once more")
    parsed.add_argument("--workers", type=int, default=2)
    parsed.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "stablekd-mutation")
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.seed, given.each)
    elif given.command == "run":
        run(given.room or list(ROOMS), given.again, given.survivors, given.folder, given.workers)
    else:
        write_report({room: (*chosen_mutants(room), outcomes(room)) for room in ROOMS})


if __name__ == "__main__":
    main()
