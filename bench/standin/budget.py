"""What a step gives a device to do, counted on fake CUDA tensors: kernels, bytes, floating-point operations, copies."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves

from stablekd_fast.bench.standin.device import StandIn, standin
from stablekd_fast.bench.standin.fakes import as_cudnn_lays_out, walk_backward
from stablekd_fast.bench.standin.kernel_table import Work, joined_convolution, work_of
from stablekd_fast.bench.standin.traffic import Shipment, Traffic

OURS = "stablekd"
"""The namespace of the package's own operators."""


class Budget(Traffic):
    """Traffic that is kept as `Work`. What is captured belongs to its graph, and counts whenever that is replayed."""

    def __init__(self, stand: StandIn) -> None:
        super().__init__()
        self.stand = stand
        self.work: list[Work] = []
        self.shipments: Counter[Shipment] = Counter()
        """Bytes by the way in which they were copied."""
        self.beside: list[Work] = []
        """What the last step gave the device on another stream than the one that computes."""
        self.copies: Counter[Shipment] = Counter()
        """How many copies those were."""
        self._captured: defaultdict[object, list[Work]] = defaultdict(list)

    def of(self, step: Callable[[], object]) -> list[Work]:
        """Run a step; return what it gave the device: by itself, and by the graphs that it replayed. `shipments`,
        `copies` and `beside` are those of this step."""
        self.work.clear()
        self.shipments.clear()
        self.copies.clear()
        self.beside.clear()
        before = len(self.stand.log)
        step()
        replays = [entry[1:] for entry in self.stand.log[before:] if entry[0] == "replay"]
        for stream, graph in replays:
            if stream != self.stand.stream.number:
                self.beside += self._captured[graph]
        return self.work + [work for _, graph in replays for work in self._captured[graph]]

    def ship(self, shipment: Shipment, nbytes: int) -> None:
        self.shipments[shipment] += nbytes
        self.copies[shipment] += 1

    def note(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Any) -> None:
        if function.is_view or function.overloadpacket.__name__ == "unbind":
            return
        if function.overloadpacket is torch.ops.stablekd.conv_act:
            self._keep(joined_convolution(args, result))
        elif function.namespace == OURS:
            self._launches(function, args, kwargs)
        else:
            self._keep(work_of(function, args, kwargs, result))

    def _keep(self, work: Work) -> None:
        (self.work if self.stand.graph is None else self._captured[self.stand.graph]).append(work)
        if self.stand.graph is None and self.stand.stream is not self._stream:
            self.beside.append(work)

    def _launches(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        """Run what serves an operator of ours on CUDA: its launches are kept, and torch's operations around them."""

        def launch(arguments: dict) -> None:
            tensors = {id(leaf): leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
            self._keep(Work("ours", 1, sum(tensor.nbytes for tensor in tensors.values())))

        with _triton_tells(launch), self:
            function._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)


@contextlib.contextmanager
def _triton_tells(launch: Callable[[dict], None]) -> Iterator[None]:
    """A context in which Triton's kernels are not compiled and not launched; `launch` is told their arguments."""

    def chosen(kernel: object, grid: object) -> Callable[..., None]:
        return lambda **arguments: launch(arguments)

    with contextlib.ExitStack() as stack:
        try:
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction
        except ImportError:  # references serve all operators then, by torch's operations
            pass
        else:
            for kind in (InterpretedFunction, JITFunction):
                stack.enter_context(mock.patch.object(kind, "__getitem__", chosen))
        yield


@contextlib.contextmanager
def counting() -> Iterator[Budget]:
    """A context in which tensors that are made are fake ones, the engine believes in a GPU that computes in bf16, and
    all that it is given to do is counted."""
    aligned = mock.patch.object(fake_tensor.FakeTensor, "data_ptr", lambda tensor: 16 * (1 + id(tensor) % 1024))
    patches = [
        aligned,
        mock.patch.object(torch.autograd, "backward", walk_backward),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        mock.patch("stablekd_fast.cache.memory_rows.core", None),  # its threads would read what fakes do not have
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", as_cudnn_lays_out),
    ]
    with standin() as stand, contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        budget = Budget(stand)
        stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(budget)
        yield budget
