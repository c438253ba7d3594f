"""Several actors of a cache, of which one runs at a time and any may be killed, in an order drawn at each system call.

What runs is the cache's own code; only the order is chosen here. The system's locks belong to open files, so actors in
threads of one process exclude each other as processes do.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import os
import random
import threading
from collections.abc import Callable, Iterator
from unittest import mock

CALLS = (
    "open", "close", "rename", "replace", "unlink", "mkdir", "rmdir", "stat", "fstat", "scandir", "listdir", "pread",
    "preadv", "pwrite", "fsync", "posix_fallocate", "truncate",
)  # fmt: skip
_PATIENCE = 2000
"""So many vain tries for locks in a row are a deadlock."""


class Killed(BaseException):
    """An actor was killed. Nothing it does afterwards happens, but that its files are closed."""


class Actor:
    def __init__(self, name: str, act: Callable[[], None], dies_at: int | None) -> None:
        self.name, self.act, self.dies_at = name, act, dies_at
        self.calls, self.files, self.killed = 0, set(), False
        self.error: BaseException | None = None


class Schedule:
    """Runs actors, each call of theirs in an order that `seed` draws. `trace` has (actor, call) in that order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.trace: list[tuple[str, str]] = []
        self._alive: list[Actor] = []
        self._turn: Actor | None = None
        self._changed = threading.Condition()
        self._vain = 0
        self._here = threading.local()

    def run(self, acts: dict[str, Callable[[], None]], kills: dict[str, int] | None = None) -> dict[str, Actor]:
        """Run all actors to their ends. `kills` says at which of its calls an actor dies. Raises the first error."""
        actors = {name: Actor(name, act, (kills or {}).get(name)) for name, act in acts.items()}
        self._alive = list(actors.values())
        threads = [threading.Thread(target=self._live, args=(actor,), daemon=True) for actor in self._alive]
        with self._hooked():
            self._pass_on()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive(), f"an actor hangs: {self.trace[-20:]}"
        for actor in actors.values():
            if actor.error is not None:
                raise actor.error
        return actors

    def _live(self, actor: Actor) -> None:
        self._here.actor = actor
        with self._changed:
            self._changed.wait_for(lambda: self._turn is actor)
        try:
            actor.act()
        except Killed:
            pass
        except BaseException as error:  # told by `run`
            actor.error = error
        for file in list(actor.files):
            with contextlib.suppress(OSError):
                REAL["close"](file)
        with self._changed:
            self._alive.remove(actor)
            self._pass_on()

    def _pass_on(self) -> None:
        with self._changed:
            self._turn = self.random.choice(self._alive) if self._alive else None
            self._changed.notify_all()

    def _before(self, call: str) -> Actor | None:
        """Wait for the actor's turn at a call. Returns the actor, None outside of any."""
        actor = getattr(self._here, "actor", None)
        if actor is None:
            return None
        if actor.killed:
            if call == "close":
                return actor
            raise Killed
        actor.calls += 1
        if actor.calls == actor.dies_at:
            actor.killed = True
            self.trace.append((actor.name, f"killed before {call}"))
            raise Killed
        with self._changed:
            self._pass_on()
            self._changed.wait_for(lambda: self._turn is actor)
        self.trace.append((actor.name, call))
        return actor

    def _call(self, call: str, *args, **options):
        actor = self._before(call)
        found = REAL[call](*args, **options)
        if actor is not None and call == "open":
            actor.files.add(found)
        elif actor is not None and call == "close":
            actor.files.discard(args[0])
        return found

    def _adopt(self, opened, file, *args, **options):
        """A file object takes over a descriptor, and closes it."""
        made, actor = opened(file, *args, **options), getattr(self._here, "actor", None)
        if actor is not None:
            actor.files.discard(made.fileno())
        return made

    def _flock(self, file: int, how: int) -> None:
        """Lock a file as the system does; who has to wait lets others go on."""
        while True:
            actor = self._before("flock")
            try:
                REAL_FLOCK(file, how if actor is None else how | fcntl.LOCK_NB)
                self._vain = 0
                return
            except BlockingIOError:
                if actor is None or how & fcntl.LOCK_NB:
                    raise
                self._vain += 1
                assert self._vain < _PATIENCE, f"nobody goes on: {self.trace[-20:]}"

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as all_hooks:
            for call in CALLS:
                hook = lambda *a, call=call, **k: self._call(call, *a, **k)  # noqa: E731
                all_hooks.enter_context(mock.patch.object(os, call, hook))
            for place, name in ((os, "fdopen"), (builtins, "open")):
                opened = getattr(place, name)
                hook = lambda *a, opened=opened, **k: self._adopt(opened, *a, **k)  # noqa: E731
                all_hooks.enter_context(mock.patch.object(place, name, hook))
            all_hooks.enter_context(mock.patch.object(fcntl, "flock", self._flock))
            yield


REAL, REAL_FLOCK = {call: getattr(os, call) for call in CALLS}, fcntl.flock
