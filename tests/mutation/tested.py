"""Which tests run which lines of a room, and running some of them."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from sandbox import ROOT, Sandbox

SPARE = 4.0, 60.0
"""The time that a test may take with a bug: so many times what it took without one, and so many seconds more. All of
them together may take as much."""
_NO_END = 70
"""The exit status where a test does not end."""


class _Plugin:
    """Runs the chosen tests, quick files first; notes how long each took, and the first one that fails or does not
    end."""

    def __init__(self, chosen: dict[str, float] | None, coverage, outcome: Path) -> None:
        self.chosen, self.coverage, self.outcome = chosen, coverage, outcome
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, config, items) -> None:
        if self.chosen is None:
            return
        totals: dict[Path, float] = defaultdict(float)
        for item in items:
            totals[item.path] += self.chosen.get(item.nodeid, 0.0)
        items[:] = [item for item in items if item.nodeid in self.chosen]
        items.sort(key=lambda item: totals[item.path])  # stable: within a file the order stays

    def pytest_runtest_logstart(self, nodeid, location) -> None:
        if self.chosen is not None:
            times, more = SPARE
            signal.signal(signal.SIGALRM, partial(self._end, nodeid))
            signal.setitimer(signal.ITIMER_REAL, times * self.chosen.get(nodeid, 0.0) + more)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item) -> None:
        self._enter(item, "setup")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item) -> None:
        self._enter(item, "call")

    def _enter(self, item, phase: str) -> None:
        if self.coverage:
            self.coverage.switch_context(f"{item.nodeid} ({phase})")  # as PYTEST_CURRENT_TEST has it

    def _end(self, nodeid: str, *_) -> None:
        self.failed.append(nodeid)
        self.write()
        os._exit(_NO_END)

    def write(self) -> None:
        """Say what came of the tests."""
        self.outcome.write_text(json.dumps({"seconds": self.seconds, "failed": self.failed}))

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def run_tests(
    tests: list[str], outcome: Path, chosen: dict[str, float] | None = None, cover: Path | None = None
) -> int:
    """Run tests in this process, a fresh one, and write what came of them."""
    coverage = None
    if cover is not None:
        from coverage import Coverage

        coverage = Coverage(config_file=str(cover))
        coverage.start()
    plugin = _Plugin(chosen, coverage, outcome)
    stop = ["-x"] if chosen is not None else []
    status = pytest.main(["-n0", "-q", "--no-header", "-p", "no:cacheprovider", *stop, *tests], plugins=[plugin])
    if coverage:
        coverage.stop()
        coverage.save()
    plugin.write()
    return int(status)


@dataclass
class Map:
    """Which tests of a room run which lines."""

    seconds: dict[str, float]
    """Of each test that passes."""
    lines: dict[str, dict[int, set[str]]]
    """By file and line."""

    def chosen(self, path: str, line: int, at_import: bool) -> dict[str, float]:
        """Return the tests that a change at a line can alter; all, where that is not known."""
        own, found = self.lines.get(path, {}), set()
        if own and not at_import:
            found = set().union(*(own.get(number, ()) for number in _statement(path, line)))
        found = found or set(self.seconds)
        return {name: seconds for name, seconds in self.seconds.items() if name in found}


def _statement(path: str, line: int) -> range:
    """The lines of the innermost statement around a line; of one that has a body, its head only."""
    best = range(line, line + 1)
    for node in ast.walk(ast.parse((ROOT / path).read_bytes())):
        if isinstance(node, (ast.stmt, ast.ExceptHandler)) and node.lineno <= line <= node.end_lineno:
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            if line <= last:
                best = range(node.lineno, last + 1)
    return best


def make_map(sandbox: Sandbox, room: dict, folder: Path) -> Map:
    """Run all tests of a room once, and note which lines each runs, in all the processes that it starts."""
    kept, data, digest = folder / "map.json", folder / "coverage", _digest(sandbox, room)
    if not kept.exists() or json.loads(kept.read_text())["digest"] != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config, outcome = folder / "coveragerc", folder / "outcome.json"
        sources = "\n    ".join(str(sandbox.tree / source) for source in room["sources"])
        config.write_text(
            f"[run]\ndata_file = {data}\nparallel = true\nsource =\n    {sources}\n"
            "context = ${PYTEST_CURRENT_TEST-}\n"
            "disable_warnings = no-data-collected, module-not-imported, module-not-measured\n"
        )
        process = sandbox.start(
            lambda: run_tests(room["tests"], outcome, cover=config),
            folder / "map.log",
            {"COVERAGE_PROCESS_START": str(config)},
        )
        while process.status is None:
            process.wait(60.0)
        process.end()
        kept.write_text(json.dumps({"digest": digest, **_merged(sandbox, data, json.loads(outcome.read_text()))}))
    found = json.loads(kept.read_text())
    lines = {
        path: {int(line): set(tests) for line, tests in by_line.items()} for path, by_line in found["lines"].items()
    }
    return Map(found["seconds"], lines)


def _digest(sandbox: Sandbox, room: dict) -> str:
    """What tells whether tests and sources of a room are those of before."""
    digest = hashlib.sha256()
    for place in (*room["sources"], *room["tests"]):
        for path in sorted((sandbox.tree / place).rglob("*.py")):
            digest.update(str(path.relative_to(sandbox.tree)).encode() + path.read_bytes())
    return digest.hexdigest()


def _merged(sandbox: Sandbox, data: Path, outcome: dict) -> dict:
    """Return seconds of the tests that pass, names of those that fail, and by file and line the tests that run it."""
    from coverage import CoverageData
    from coverage.exceptions import CoverageException

    merged = CoverageData(no_disk=True)
    for part in sorted(data.parent.glob(f"{data.name}.*")):
        one = CoverageData(basename=str(part))
        try:
            one.read()
        except CoverageException:
            continue  # of a process that was killed while it wrote
        merged.update(one)
    passed = {name: seconds for name, seconds in outcome["seconds"].items() if name not in outcome["failed"]}
    lines: dict[str, dict[int, list[str]]] = {}
    for file in merged.measured_files():
        path = str(Path(file).relative_to(sandbox.tree))
        lines[path] = {
            line: sorted(set().union(*(_tests(context, passed) for context in contexts)))
            for line, contexts in merged.contexts_by_lineno(file).items()
        }
    return {"seconds": passed, "failed": outcome["failed"], "lines": lines}


def _tests(context: str, tests: dict[str, float]) -> set[str]:
    """The tests of a context, which is a test and its phase. What is set up for one may serve all of its file."""
    if context.endswith(" (setup)"):
        file = context.split("::")[0]
        return {name for name in tests if name.split("::")[0] == file}
    return {context.removesuffix(" (call)").removesuffix(" (teardown)")} & tests.keys()
