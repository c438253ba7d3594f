"""The processes of one run, and what they tell each other. Everything goes through torch.distributed.

All processes run the same program over the same settings; the first one writes the files. A process alone is one rank
of one, for which every exchange is nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stablekd_fast.errors import ConfigError, RankError, first_line
from stablekd_fast.execution.moments import Clock, Moment, give_up

T = TypeVar("T")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_SETTLING_SECONDS = 3.0
"""How long a rank whose exchange failed waits for others to say that theirs failed too."""
_PARTING_SECONDS = 0.5
_POLLING_SECONDS = 5e-4


@dataclass
class Ranks:
    """This process among `size`, counted from 0.

    An exchange that fails, because a rank is gone or does not come within the timeout, raises RankError that names it.
    """

    rank: int = 0
    size: int = 1
    timeout: float = 600.0
    """The most seconds that an exchange may take."""
    where: Callable[[], str] = field(default=lambda: "the start")
    """Says where in the run this rank is, for the error of an exchange that fails."""
    gradient_bytes: int = 0
    """The bytes handed to all-reduces of gradients so far; a captured step counts once, when it is captured."""
    other_bytes: int = 0
    """The bytes of tensors handed to other exchanges so far."""
    clock: Clock = field(default_factory=lambda: Clock(torch.device("cpu")))
    """Times exchanges under the name `waiting_in`, waiting for ranks that are late included; not those within a graph,
    which no event can time."""
    waiting_in: str = "other"
    exchanges_captured: bool = False
    """Whether an exchange was captured in a graph."""
    _store: dist.Store | None = None
    _groups: dict[tuple[int, int], dist.ProcessGroup] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    @property
    def can_name(self) -> bool:
        """Whether ranks can leave word for each other; not where the caller has made the process group."""
        return self.size == 1 or self._store is not None

    @property
    def restarted(self) -> bool:
        """Whether torchrun has started the processes anew after one was lost."""
        return int(os.environ.get(RESTARTS, 0)) > 0

    def data_group(self, blocks: int, data: int, device: torch.device) -> dist.ProcessGroup:
        """The ranks beside this one on the data axis of a mesh of `blocks` times `data` ranks. The groups of a mesh are
        made once; all ranks must ask in the same order."""
        if (blocks, data) not in self._groups:
            with self.meeting("a mesh is made"):
                for first in range(0, blocks * data, data):
                    members = list(range(first, first + data))
                    limit = datetime.timedelta(seconds=self.timeout)  # torch's own is half an hour
                    group = dist.group.WORLD if blocks == 1 else dist.new_group(members, timeout=limit)
                    if self.rank in members:
                        assert isinstance(group, dist.ProcessGroup)
                        _let_us_speak_first(group, device, self.timeout)
                        self._groups[blocks, data] = group
        return self._groups[blocks, data]

    def wait(self, moment: Moment, what: str) -> None:
        """Wait until the device has come to `moment`. Other ranks may have a part in what it does before.

        Raises RankError, which names the ranks that are missing, if it does not come there within the timeout: a
        captured step that waits for a rank is watched by nobody else.
        """
        if self.size == 1:
            return moment.wait()
        deadline = time.monotonic() + self.timeout
        try:
            while not moment.passed:
                if time.monotonic() > deadline:
                    raise RuntimeError("the GPU does not come to the end of its work")
                time.sleep(_POLLING_SECONDS)
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """Overwrite `tensors`, alike in shape on all ranks, with those of the rank `source`. One exchange per dtype."""
        if self.size == 1:
            return
        with torch.no_grad(), self.meeting("state is shared"):
            for alike in _by_dtype(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in alike])
                self.other_bytes += flat.nbytes
                dist.broadcast(flat, source)
                _unflatten(flat, alike)
        if tensors:
            self.wait(Moment(tensors[0].device), "state is shared")

    def average_gradients(self, tensors: Sequence[Tensor], group: dist.ProcessGroup, count: int) -> None:
        """Overwrite float32 or float64 `tensors` with their means over the `count` ranks of a process group: one
        all-reduce per dtype.

        The host never waits for a GPU in it, so it can be part of a captured step.
        """
        for alike in _by_dtype(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            self.gradient_bytes += flat.nbytes
            with self.meeting("gradients are averaged", group):
                dist.all_reduce(flat, group=group)
            _unflatten(flat.div_(count), alike)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Overwrite `values`, alike in shape on all ranks, with their sum, and return it."""
        if self.size > 1:
            self.other_bytes += values.nbytes
            with self.meeting("values are summed"):
                dist.all_reduce(values)
            self.wait(Moment(values.device), "values are summed")
        return values

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order. A value can be anything that pickle takes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.meeting("values are gathered"):
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on the first rank and return its value on all. An error there ends all of them."""
        if self.size == 1:
            return make()
        made, error = None, None
        if self.is_first:
            try:
                made = make()
            except Exception as raised:
                error = raised
        told: list[Any] = [(made, None if error is None else str(error))]
        with self.meeting("the first rank decides"):
            dist.broadcast_object_list(told, 0)
        if error is not None:
            raise error
        if told[0][1] is not None:
            raise RankError(f"The first rank failed: {told[0][1]}")
        return told[0][0]

    def check_alike(self, facts: dict[str, Any]) -> None:
        """Raise ConfigError with the difference unless all ranks have the same `facts`, plain values by name."""
        for rank, theirs in enumerate(found := self.all_gather(facts)):
            differing = [key for key in found[0].keys() | theirs.keys() if found[0].get(key) != theirs.get(key)]
            if differing:
                listed = "; ".join(f"{key}: {found[0].get(key)!r} and {theirs.get(key)!r}" for key in sorted(differing))
                raise ConfigError(
                    f"Rank 0 and rank {rank} differ ({listed}). All ranks must start with the same settings, data "
                    "and weights."
                )

    def say_where(self) -> None:
        """Leave word where this rank is, for ranks that may wait for it in vain later."""
        if self._store is not None:
            with self._leaving_word():
                self._store.set(f"stablekd/at/{self.rank}", json.dumps([self.where(), time.time()]))

    def name_once(self, key: str, value: Any) -> None:
        """Name a value, of JSON types, under a key, unless a rank has named one before."""
        if self._store is not None:
            with self._leaving_word():
                self._store.compare_set(f"stablekd/named/{key}", "", json.dumps(value))

    def named(self, key: str) -> Any:
        """What a rank has named under a key; None if none has. No exchange: ranks may see it at different times."""
        if self._store is None:
            return None
        with self._leaving_word():
            known = self._store.check([f"stablekd/named/{key}"])
            return json.loads(self._store.get(f"stablekd/named/{key}")) if known else None

    @contextlib.contextmanager
    def _leaving_word(self) -> Iterator[None]:
        """A context for words that ranks leave for each other. Raises RankError where who keeps them is gone."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            raise self._lost("ranks leave word for each other", error) from error

    @contextlib.contextmanager
    def meeting(self, what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
        """A context for an exchange in a group (of all ranks, without one), whose seconds the clock counts.

        Raises RankError if the exchange fails. Its message says that the rank waited where `what`, and names the ranks
        that did not come.
        """
        captured = self.clock.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.exchanges_captured |= captured
        try:
            with contextlib.nullcontext() if captured else self.clock.timing(self.waiting_in):
                yield
        except (RuntimeError, dist.DistError) as error:
            raise self._lost(what, error, group) from error

    def _lost(self, what: str, error: Exception, group: dist.ProcessGroup | None = None) -> RankError:
        """The error for an exchange that failed. A GPU may go on to wait for the rank that is gone, in another one."""
        give_up(self.clock.device)
        among = range(self.size) if group is None else dist.get_process_group_ranks(group)
        return RankError(self._missing(what, error, among))

    def _missing(self, what: str, error: Exception, among: Iterable[int]) -> str:
        """The message on an exchange that failed. Ranks that wait too say so in the store; the others are missing."""
        reason = first_line(error)
        head = (
            f"Rank {self.rank} waited in vain at {self.where()}, where {what} (timeout {self.timeout:g} s): {reason}."
        )
        remedy = (
            "Look at that rank's own output; "
            "torchrun --max-restarts N starts all of them again from the last checkpoint."
        )
        if self._store is None:
            return f"{head} {remedy}"
        try:
            self._store.set(f"stablekd/waiting/{self.rank}", "1")
            time.sleep(_SETTLING_SECONDS)
            missing = [rank for rank in among if not self._store.check([f"stablekd/waiting/{rank}"])]
            said = [f"rank {rank}, last heard of at {_last_heard(self._store, rank)}" for rank in missing]
        except (RuntimeError, dist.DistError):  # the process that held the store is gone as well
            return f"{head} {remedy}"
        return f"{head} Missing: {'; '.join(said) or 'none, the connection broke'}. {remedy}"

    def finish(self) -> None:
        """Wait until all ranks are done with their work and files; torchrun ends all when one ends in an error."""
        self.all_gather(None)


def join(device: torch.device, timeout: float) -> Ranks:
    """Meet the other processes that torchrun has started; without torchrun, this process is the only rank.

    NCCL exchanges tensors on GPUs, Gloo those on CPUs. Ranks that train on the same cores divide them. Raises
    ConfigError if the processes cannot meet.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _meet("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout))
    _let_us_speak_first(dist.group.WORLD, device, timeout)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), timeout, clock=Clock(device), _store=store)
    if store is not None:  # otherwise the caller made the process group, and the process is the caller's
        _divide_cores(ranks, device)
    return ranks


def _divide_cores(ranks: Ranks, device: torch.device) -> None:
    """On a CPU, bind each of the ranks that may use the same cores to cores of its own, if there are enough.

    Otherwise the threads of one rank that read rows or decode images push the training of others from core to core.
    Nothing is bound where the system does not allow it.
    """
    cores = sorted(os.sched_getaffinity(0)) if device.type == "cpu" and hasattr(os, "sched_setaffinity") else []
    here = [_machine(), cores]
    sharing = [rank for rank, there in enumerate(ranks.all_gather(here)) if there == here]
    if len(sharing) < 2 or len(cores) < len(sharing):
        return
    place = sharing.index(ranks.rank)
    first, last = (len(cores) * at // len(sharing) for at in (place, place + 1))
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), cores[first:last])
        torch.set_num_threads(min(torch.get_num_threads(), last - first))


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()


def _last_heard(store: dist.Store, rank: int) -> str:
    key = f"stablekd/at/{rank}"
    if not store.check([key]):
        return "its start"
    place, when = json.loads(store.get(key))
    return f"{place}, {time.time() - when:.0f} s ago"


@functools.cache
def _meet(backend: str, limit: datetime.timedelta) -> dist.Store | None:
    """Make the process group, once per process for all of its runs. Returns the store through which the processes met;
    None where the caller had made the group."""
    if dist.is_initialized():
        return None
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"try{os.environ.get(RESTARTS, 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes were announced, but they cannot meet ({error}). Start "
            "them with torchrun --nproc-per-node N -m stablekd_fast ..., or unset WORLD_SIZE to run alone."
        ) from error
    atexit.register(_part)
    return store


def _part() -> None:
    """Leave the process group, a little later: Gloo's threads may still hold tensors of the last exchange and need the
    interpreter to free them; one that has ended meanwhile would abort the process."""
    time.sleep(_PARTING_SECONDS)
    if dist.is_initialized():
        dist.destroy_process_group()


def _let_us_speak_first(group: dist.ProcessGroup | None, device: torch.device, timeout: float) -> None:
    """Have NCCL's own watch, which ends the process and names nobody, wait until `Ranks.wait` has had its time."""
    if device.type == "cuda" and group is not None:
        later = datetime.timedelta(seconds=2 * timeout + 60)
        group._get_backend(device)._set_default_timeout(later)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    return list(kinds.values())


def _unflatten(flat: Tensor, into: Sequence[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in into])
    torch._foreach_copy_(list(into), [part.view(tensor.shape) for part, tensor in zip(parts, into)])
