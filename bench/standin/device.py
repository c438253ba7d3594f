"""Streams, events, graphs, generators and an allocator that stand in for those of `torch.cuda`.

They follow torch's rules as far as the engine relies on them, failures included: a capture that cannot be ended leaves
its stream current, its generator capturing, and the allocator counting its pool as one that a capture fills.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from stablekd_fast.execution import capture, side

Pool = tuple[int, int]


@dataclass(eq=False)
class Stream:
    """A stream of one device."""

    device: torch.device
    number: int
    stand: StandIn | None = field(default=None, repr=False)

    def wait_stream(self, other: Stream) -> None:
        """Join a capture that the other stream is part of."""
        assert self.stand is not None
        self.stand.note("wait", self, other)
        if other in self.stand.capturing:
            self.stand.capturing.append(self)

    def wait_event(self, event: Event) -> None:
        """Begin later work when the event has come to pass."""
        assert self.stand is not None
        self.stand.note("wait event", self, event)


class Event:
    """An event. It has come to pass unless the stand-in's device `hangs`."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing
        self.at: float | None = None
        self.stand = _current()

    def record(self, stream: Stream | None = None) -> None:
        """Note where the device stands by now."""
        stream = stream or self.stand.stream
        if stream in self.stand.capturing:
            raise RuntimeError("operation not permitted when stream is capturing: the event cannot be timed")
        self.at = self.stand.seconds

    def query(self) -> bool:
        """Whether the device has come so far."""
        return not self.stand.hangs

    def synchronize(self) -> None:
        """Wait. Where the device hangs this would never end."""
        self.stand.host_waits("Event.synchronize")

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds of the device's own time."""
        assert self.timed and later.timed and self.at is not None and later.at is not None
        return 1e3 * (later.at - self.at)


class Graph:
    """A graph that holds the pool of its capture."""

    def __init__(self) -> None:
        self.stand, self.pool, self.captured = _current(), None, False

    def replay(self) -> None:
        """Take as long as the stand-in says that work takes."""
        self.stand.note("replay", self.stand.stream, self)
        self.stand.seconds += self.stand.step_seconds

    def reset(self) -> None:
        """Give the pool back, if the capture was ended."""
        if self.captured and self.pool is not None:
            self.stand.pools[self.pool] -= 1
        self.captured, self.pool = False, None

    def __del__(self) -> None:
        self.reset()


class Capture:
    """`torch.cuda.graph`: a context in which a stream captures."""

    def __init__(
        self, graph: Graph, pool: Pool | None = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.stand = _current()
        self.graph, self.pool = graph, pool or self.stand.new_pool()
        self.stream = stream or self.stand.new_stream()

    def __enter__(self) -> None:
        stand = self.stand
        if stand.filling:
            raise RuntimeError("captures_underway is not empty: the allocator keeps all that is freed")
        self.before, stand.streams[stand.index] = stand.stream, self.stream
        stand.pools[self.pool] += 1
        stand.filling.add(self.pool)
        stand.capturing.append(self.stream)
        stand.generators[stand.index].capturing = True
        self.graph.pool = self.pool
        stand.graph = self.graph

    def __exit__(self, kind: type | None, *rest: object) -> None:
        stand = self.stand
        stand.capturing.clear()
        stand.graph = None
        failure = stand.capture_fails() if stand.capture_fails else None
        if failure is not None or stand.broken:
            stand.broken = False
            raise failure or RuntimeError("operation failed due to a previous error during capture")
        stand.filling.discard(self.pool)
        stand.generators[stand.index].capturing = False
        self.graph.captured = True
        stand.streams[stand.index] = self.before


class Generator:
    """The generator of one device: a state, and whether a capture has it."""

    def __init__(self, number: int) -> None:
        self.value, self.capturing = torch.full((16,), number, dtype=torch.uint8), False

    def clone_state(self) -> Generator:
        """Make a generator that no capture has, in the same state."""
        other = Generator(0)
        other.value = self.value.clone()
        return other

    def graphsafe_set_state(self, state: Generator) -> None:
        """Take the state of another one."""
        self.value, self.capturing = state.value, state.capturing


@dataclass
class StandIn:
    """What was done to the devices, and how they behave."""

    count: int = 2
    hangs: bool = False
    """Whether nothing that the devices were given ever ends."""
    capture_fails: Callable[[], Exception | None] | None = None
    """Called at the end of every capture; what it returns is raised there, as torch raises it."""
    step_seconds: float = 0.0
    """How long a replay takes on the device."""
    seconds: float = 0.0
    """The devices' own time."""
    index: int = 0
    """The current device."""
    broken: bool = False
    """Whether the capture that goes on has met something that it cannot contain."""
    log: list[tuple] = field(default_factory=list)
    """What happened, in order: what it was, the number of the stream that it was put on, and further facts."""
    pools: Counter[Pool] = field(default_factory=Counter)
    """How often each memory pool is held."""
    filling: set[Pool] = field(default_factory=set)
    """Pools that the allocator believes to be filled by a capture."""
    capturing: list[Stream] = field(default_factory=list)
    graph: Graph | None = None
    """The graph into which something is captured."""

    def __post_init__(self) -> None:
        self.generators = [Generator(number) for number in range(self.count)]
        self.defaults = [Stream(torch.device("cuda", number), 0, stand=self) for number in range(self.count)]
        self.streams = list(self.defaults)
        self._made = self._pools = 0

    @property
    def stream(self) -> Stream:
        """The current stream of the current device."""
        return self.streams[self.index]

    @property
    def sound(self) -> bool:
        """Whether captures have left nothing behind: streams, allocator and generators are as they were."""
        held = [pool for pool, count in self.pools.items() if count]
        left = self.filling or held or self.capturing or any(one.capturing for one in self.generators)
        return not left and self.streams == self.defaults

    def note(self, what: str, stream: Stream, *facts: object) -> None:
        """Log something that was put on a stream."""
        self.log.append((what, stream.number, *facts))

    def host_waits(self, how: str) -> None:
        """Called where the host waits for a device."""
        if self.capturing:
            self.broken = True
            raise RuntimeError(f"{how}: operation not permitted when stream is capturing")
        if self.hangs:
            raise AssertionError(f"{how}: the host waits for a device that hangs, for ever")

    def new_stream(self, device: torch.device | int | None = None, **_: object) -> Stream:
        """Make a stream."""
        self._made += 1
        return Stream(torch.device("cuda", self.number(device)), self._made, stand=self)

    def new_pool(self) -> Pool:
        """Make a memory pool."""
        self._pools += 1
        return 0, self._pools

    def number(self, device: torch.device | int | str | None) -> int:
        """The number of a device; the current one, where none is meant."""
        if device is None or isinstance(device, int):
            return self.index if device is None or device < 0 else device
        index = torch.device(device).index
        return self.index if index is None else index

    def exchange(self, index: int) -> int:
        """Make a device current, and return which one was before."""
        before = self.index
        if index >= 0:
            self.index = index
        return before

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """A context in which a stream is current."""
        device = self.exchange(self.number(stream.device))
        before, self.streams[self.index] = self.stream, stream
        try:
            yield
        finally:
            self.streams[self.index] = before
            self.index = device

    def set_stream(self, stream: Stream) -> None:
        """Make a stream current."""
        self.streams[self.number(stream.device)] = stream

    def end_pool(self, index: int, pool: Pool) -> None:
        """Tell the allocator that no capture fills a pool any more."""
        if pool not in self.filling:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.filling.discard(pool)

    def release_pool(self, index: int, pool: Pool) -> None:
        """Hold a pool once less."""
        self.pools[pool] -= 1

    def random_state(self, device: torch.device | int | str | None = None) -> Tensor:
        """The state of a device's generator."""
        return self.generators[self.number(device)].value.clone()

    def set_random_state(self, state: Tensor, device: torch.device | int | str | None = None) -> None:
        """Set the state of a device's generator."""
        self.generators[self.number(device)].value = state.clone()

    def exchanged(self, name: str) -> Callable:
        """Something in place of an exchange between ranks, which logs bytes and group."""

        def exchange(value: Tensor | list, *rest: object, group: object = None, **_: object) -> None:
            tensors = value if isinstance(value, list) else [value]
            self.note(name, self.stream, sum(tensor.nbytes for tensor in tensors), group)

        return exchange


_STANDING: list[StandIn] = []


def _current() -> StandIn:
    return _STANDING[-1]


@contextlib.contextmanager
def standin(**settings: object) -> Iterator[StandIn]:
    """A context in which `torch.cuda` is a `StandIn` with these settings. Tensors stay where they are: on the CPU, or
    fake ones on a fake GPU."""
    stand = StandIn(**settings)  # type: ignore[arg-type]
    patches = {
        torch.cuda: {
            # torch may be told to believe in a driver wherever devices are counted, and would then ask the driver.
            "is_available": lambda: False,
            "device_count": lambda: stand.count,
            "current_device": lambda: stand.index,
            "_exchange_device": stand.exchange,
            "_maybe_exchange_device": stand.exchange,
            "set_device": lambda device: stand.exchange(stand.number(device)),
            "current_stream": lambda device=None: stand.streams[stand.number(device)],
            "default_stream": lambda device=None: stand.defaults[stand.number(device)],
            "set_stream": stand.set_stream,
            "stream": stand.on,
            "Stream": stand.new_stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "graph_pool_handle": stand.new_pool,
            "synchronize": lambda device=None: stand.host_waits("torch.cuda.synchronize"),
            "is_current_stream_capturing": lambda: stand.stream in stand.capturing,
            "default_generators": stand.generators,
            "get_rng_state": stand.random_state,
            "set_rng_state": stand.set_random_state,
            "empty_cache": lambda: None,
        },
        torch._C: {"_cuda_endAllocateToPool": stand.end_pool, "_cuda_releasePool": stand.release_pool},
        dist: {name: stand.exchanged(name) for name in ("all_reduce", "broadcast", "all_gather")},
    }
    with contextlib.ExitStack() as stack:
        for module, values in patches.items():
            for name, value in values.items():
                stack.enter_context(mock.patch.object(module, name, value, create=True))
        _STANDING.append(stand)
        stack.callback(_STANDING.pop)
        for made in (capture._stream, side._second_stream):  # those that the engine made before are of another device
            made.cache_clear()
            stack.callback(made.cache_clear)
        yield stand
