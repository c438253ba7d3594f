"""How a step runs: eagerly, compiled, as a CUDA graph, or as an emulated one. The engine's streams and graphs are here.

A *body* is a function without arguments that reads and writes tensors at fixed addresses only. Bodies of one *phase*
must not depend on each other: in a CUDA graph they are branches that run side by side. A phase begins when all of the
phase before has ended.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stablekd_fast.errors import CaptureError, ConfigError, first_line
from stablekd_fast.execution.emulator import Operation, Recording, Watch, replay
from stablekd_fast.execution.memory import no_garbage_collection
from stablekd_fast.execution.moments import given_up

CAPTURES = ("auto", "eager", "cudagraph", "compile", "cudagraph+compile", "emulate")
CAPTURED = ("cudagraph", "cudagraph+compile", "emulate")
"""Modes in which bodies run once, and from then on what they did is replayed."""
COMPILED = ("compile", "cudagraph+compile")
"""Modes whose bodies hold what torch.compile made."""
WARM_UP = 3
"""Runs of all bodies before they are captured. They leave no trace."""
_RECOMPILE_LIMIT = 1024

Body = Callable[[], Any]


class Runner(Protocol):
    """Runs bodies again and again.

    `results` are what the bodies returned; those of captured bodies are overwritten in place.
    """

    results: list[Any]

    def run(self) -> list[Any]: ...

    def close(self) -> None:
        """Let go of graphs, before the tensors that they use."""


def pick_capture(name: str, device: torch.device) -> str:
    """The mode of capture called `name`; `auto` is `cudagraph` on a GPU, `eager` elsewhere.

    Raises ConfigError for a mode that the device does not have.
    """
    if name not in CAPTURES:
        raise ConfigError(f"capture={name!r} was given; choose one of {', '.join(CAPTURES)}.")
    if "cudagraph" in name and device.type != "cuda":
        raise ConfigError(f"capture={name} was given, but the device is {device}; choose eager, compile or auto.")
    if name == "auto":
        return "cudagraph" if device.type == "cuda" else "eager"
    return name


def make_runner(
    mode: str,
    bodies: Sequence[Body],
    state: Sequence[Tensor],
    device: torch.device,
    *,
    fall_back: bool,
    then: Sequence[Sequence[Body]] = (),
) -> Runner:
    """A runner for bodies, by a mode that `pick_capture` gave: `bodies` are its first phase, `then` further ones.

    `state` holds all tensors that outlive a run and that the bodies change. Making a runner leaves them as they were,
    and the device usable, also where that fails. With `fall_back`, bodies that cannot be captured run without a graph,
    after one warning that names what broke capture; without it, CaptureError is raised.
    """
    phases = [bodies, *then]
    uncaptured = CompiledRunner if mode in COMPILED else EagerRunner
    if mode not in CAPTURED:
        return uncaptured(phases)
    try:
        if mode == "emulate":
            return EmulatedRunner(phases, state, device)
        return GraphRunner(phases, state, device, compiled=mode in COMPILED)
    except CaptureError as error:
        if not fall_back:
            if isinstance(cause := error.__cause__, torch.OutOfMemoryError):
                raise cause from None  # `watched` explains it
            raise
        warnings.warn(f"Training goes on without a captured graph: {error}", RuntimeWarning, stacklevel=2)
        return uncaptured(phases)


class EagerRunner:
    """Calls the bodies in order."""

    def __init__(self, phases: Sequence[Sequence[Body]]) -> None:
        self.bodies, self.results = [body for bodies in phases for body in bodies], []

    def run(self) -> list[Any]:
        self.results = [body() for body in self.bodies]
        return self.results

    def close(self) -> None:
        self.results = []


class CompiledRunner(EagerRunner):
    """Calls bodies that hold what torch.compile made; the first run compiles."""

    _started = False

    def run(self) -> list[Any]:
        if self._started:
            return super().run()
        with _compiling():
            results = super().run()
        self._started = True
        return results


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """A context in which bodies are compiled: what cannot be is a CaptureError.

    All groups compile one and the same function, so torch's limit on its variants is raised.
    """
    from torch._dynamo.exc import TorchDynamoException  # imported late: it takes a second

    settings = torch._dynamo.config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    with settings.patch({limit: _RECOMPILE_LIMIT}):
        try:
            yield
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)  # the compiler's own words
            raise CaptureError(f"torch.compile cannot compile the step: {first_line(cause)}") from error


class EmulatedRunner:
    """Warms the bodies up, records them once and replays the records: what a CUDA graph would compute on any device."""

    def __init__(self, phases: Sequence[Sequence[Body]], state: Sequence[Tensor], device: torch.device) -> None:
        self._operations: list[Operation] = []
        with restored(state, device):
            for _ in range(WARM_UP):
                for body in (body for bodies in phases for body in bodies):
                    body()
            recording = Recording()
            with recording:
                self.results = [body() for bodies in phases for body in bodies]
            self._operations = recording.operations

    def run(self) -> list[Any]:
        replay(self._operations)
        return self.results

    def close(self) -> None:
        self._operations, self.results = [], []


class GraphRunner:
    """All bodies in one CUDA graph, those of a phase on a branch each; one replay per step.

    One graph has one memory pool in which blocks belong to streams, so branches that run at the same time never share
    memory; and one random generator, whose offsets the branches take in the order of capture.

    `compiled` bodies hold what torch.compile made: it compiles while they warm up, and its kernels are what the graph
    repeats. torch.compile steps aside wherever a dispatch mode watches, so a capture that breaks off does not know its
    last operation. That the captured bodies are the compiled ones is shown by a stand-in of the device; that the
    kernels which torch.compile makes for a GPU can be captured is not.
    """

    def __init__(
        self, phases: Sequence[Sequence[Body]], state: Sequence[Tensor], device: torch.device, *, compiled: bool = False
    ) -> None:
        self._device, self._compiled = device, compiled
        streams = [_stream(device, number) for number in range(max(map(len, phases)))]
        with torch.cuda.device(device):
            with restored(state, device), _compiling() if compiled else contextlib.nullcontext():
                self._warm_up(phases, streams)
            self._graph = torch.cuda.CUDAGraph()
            self._capture(phases, streams, state)

    def _capture(
        self, phases: Sequence[Sequence[Body]], streams: list[torch.cuda.Stream], state: Sequence[Tensor]
    ) -> None:
        last, current, pool = _Last(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            # Threads that load data call CUDA too: only this one's calls are checked.
            with (
                _own_gradients(state),
                no_garbage_collection(),  # it might destroy another graph or wait for an event
                torch.cuda.graph(self._graph, pool, streams[0], capture_error_mode="thread_local"),
                torch.compiler.set_stance("fail_on_recompile") if self._compiled else last,
            ):
                self.results = _side_by_side(phases, streams)
        except BaseException as error:
            self.results = []
            _forget_locals(error)
            _recover(self._graph, pool, current)
            if not isinstance(error, (RuntimeError, CaptureError)):
                raise
            line = first_line(_first(error))
            raise CaptureError(f"{last.operation or 'the step'} cannot be captured: {line}") from _first(error)

    def _warm_up(self, phases: Sequence[Sequence[Body]], streams: list[torch.cuda.Stream]) -> None:
        """Run on the streams of the capture, so that libraries have set up their handles and workspaces there."""
        current = torch.cuda.current_stream()
        try:
            for number in range(WARM_UP):
                for body, stream in ((body, stream) for bodies in phases for body, stream in zip(bodies, streams)):
                    stream.wait_stream(current)
                    with torch.cuda.stream(stream), Watch() if number == 0 else contextlib.nullcontext():
                        body()
                    current.wait_stream(stream)
        finally:  # what a body began before it failed must not run into the restoring of state
            torch.cuda.synchronize()

    def run(self) -> list[Any]:
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self.results

    def close(self) -> None:
        if given_up(self._device):
            return
        torch.cuda.synchronize(self._device)
        self._graph.reset()
        self.results = []


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same streams for every capture: cuBLAS keeps a workspace for each stream that it ever met."""
    return torch.cuda.Stream(device)


def _recover(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Go on after a capture that failed: make `stream`, which was current before it, current again, and give back the
    memory of `pool`.

    Where the capture could not even be ended, torch leaves its stream current and its generator capturing, and its
    allocator goes on to count the pool as one that a capture fills: it then keeps all freed memory, for good.
    """
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize()
    index = torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError):  # raised where the capture was ended; the graph then holds the pool
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    graph.reset()


def _forget_locals(error: BaseException | None) -> None:
    """Let go of what the functions held that an error has left: their tensors would live as long as the error does."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _first(error: BaseException) -> BaseException:
    """The error that came first: ending a capture that has failed is an error of its own."""
    while isinstance(error.__context__, (RuntimeError, CaptureError)):
        error = error.__context__
    return error


class _Last(Watch):
    """Remembers the operation that was dispatched last."""

    operation: str | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operation = str(function)
        return super().__torch_dispatch__(function, types, args, kwargs)


def _side_by_side(phases: Sequence[Sequence[Body]], streams: Sequence[torch.cuda.Stream]) -> list[Any]:
    """Run each body of a phase on its stream: all fork from the first, which captures, and join it again."""
    first, results = streams[0], []
    for bodies in phases:
        branches = streams[1 : len(bodies)]
        for stream in branches:
            stream.wait_stream(first)
        for body, stream in zip(bodies, streams):
            with torch.cuda.stream(stream):
                results.append(body())
        for stream in branches:
            first.wait_stream(stream)
    return results


@contextlib.contextmanager
def restored(state: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """A context that leaves no trace in `state`, its gradients, and the random generators."""
    saved = [tensor.detach().clone() for tensor in state]
    try:
        with _own_gradients(state), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, saved):
                tensor.copy_(value)


@contextlib.contextmanager
def _own_gradients(state: Sequence[Tensor]) -> Iterator[None]:
    """A context whose gradients are dropped: those of a body that broke off would be added to the first step's."""
    before = [tensor.grad for tensor in state]
    try:
        yield
    finally:
        for tensor, gradient in zip(state, before):
            tensor.grad = gradient
