"""Losses that need more than a cut or the head: relations of a batch, memories, further networks, input gradients.

An auxiliary loss is an `nn.Module` beside the student. Its parameters are trained with the student and left out of the
export; its buffers are its memory. Both are kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stablekd_fast.errors import ConfigError


class StepBatch(NamedTuple):
    """What a step computes from. The teacher's output at cut `k` is `targets[k]`, its last one, logits or an
    embedding, `targets[number of cuts]`.

    `entry`: images `[N, C, H, W]`, or the teacher's activation before the group. `labels`: int64 `[N]`, or
    probabilities `[N, classes]`. The rest is there for an auxiliary loss that asks for it: `images` `[N, C, H, W]`,
    `ids` int64 `[N]`, and `second` `[N, C, H, W]`, images in another view.
    """

    entry: Tensor
    targets: dict[int, Tensor]
    labels: Tensor | None
    images: Tensor | None = None
    ids: Tensor | None = None
    second: Tensor | None = None

    def of(self, places: Tensor) -> StepBatch:
        """Return the samples at `places`, int64 `[M]`."""
        return self._each(lambda value: value[places])

    def _each(self, taken: Callable[[Tensor], Tensor]) -> StepBatch:
        targets = {k: taken(target) for k, target in self.targets.items()}
        return StepBatch(taken(self.entry), targets, *(None if value is None else taken(value) for value in self[2:]))

    def parts(self, count: int) -> Iterator[StepBatch]:
        """Divide the batch into so many equal parts, one after the other."""
        if count == 1:
            yield self
            return
        size = len(self.entry) // count
        for start in range(0, size * count, size):
            own = slice(start, start + size)
            yield self._each(lambda value, own=own: value[own])


Network = Callable[[Tensor], dict[int, Tensor]]
"""The student's group as a function of what enters it; gives its outputs by number, as the step computes them."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run when its auxiliary loss is made."""

    classes: int
    samples: int
    """Sample ids are below it."""
    batch_size: int
    """Images of a batch of this process."""
    size: tuple[int, int]
    """Height and width of the student's images in pixels."""
    student_shapes: list[tuple[int, ...]]
    """Per image at each cut; the last one is that of the logits, or of the embedding."""
    teacher_shapes: list[tuple[int, ...]]
    """The same, as the teacher's outputs come: with the student's width where a bridge maps them."""
    channel_axes: list[int]
    """In which dimension of the student's batch the channels lie, at each cut."""
    device: torch.device
    teacher: Callable[[Tensor], Tensor] | None = None
    """The plain teacher in evaluation mode, differentiable with respect to images `[N, C, H, W]`; gives logits."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """By which the student's images are normalised, per channel of 0 to 1."""
    places: nn.Module | None = None
    """Where both networks end in tokens or maps of other places: brings the teacher's `[N, *places, D]` to the
    student's."""
    popularity: Tensor | None = None
    """Where the classes are items: how many training interactions each has, int64 `[classes]`."""

    @property
    def cuts(self) -> int:
        """The number of cuts, which is the head's number too."""
        return len(self.student_shapes) - 1

    def widths(self, cut: int) -> tuple[int, int]:
        """The channels of the student's and of the teacher's output at a cut."""
        axis = self.channel_axes[cut]
        place = axis - 1 if axis > 0 else axis  # shapes are per image
        return self.student_shapes[cut][place], self.teacher_shapes[cut][place]


class Auxiliary(nn.Module):
    """A loss that is added to those at the cuts and at the head of one group.

    A subclass says by its attributes what it reads, and computes a loss that is differentiable with respect to what
    the student gave. It must not ask the host for a number. Its `config` has the options.
    """

    reads_images: ClassVar[bool] = False
    reads_ids: ClassVar[bool] = False
    reads_input_gradient: ClassVar[bool] = False
    """Whether the loss is differentiated with respect to the images too: then `batch.entry` requires a gradient."""
    second: ClassVar[str | None] = None
    """`same`: the same images come in another view too; `last`: those of the step before."""
    relates: ClassVar[bool] = False
    """Whether the loss compares samples of a batch, or remembers them, so that it is no mean over parts of a batch."""
    gathers: ClassVar[bool] = False
    """Whether a loss that `relates` asks `gather` for what other ranks have, so that they may divide the batch."""
    needs_mix: ClassVar[bool] = False
    """Whether images must be mixed."""
    needs_classes: ClassVar[bool] = False
    """Whether labels must be classes, and cannot be the probabilities of mixed images."""
    reads_head: ClassVar[str] = "classifier"
    """What the last output must be for a loss that reads it: the logits of a `classifier`, or an `embedding`."""
    ends_networks: ClassVar[bool] = False
    """Whether it stands in place of a loss at the head: it then remembers nothing, and is measured beside training."""
    any_width: ClassVar[bool] = False
    """Whether the teacher's outputs may have another width than the student's."""
    learns: ClassVar[bool] = False
    """Whether it learns something before the first step; see `learn`."""

    def __init__(self, config: Any, facts: Facts) -> None:
        super().__init__()
        self.config, self.facts = config, facts
        self.gather: Callable[[Tensor], tuple[Tensor, int]] | None = None
        """Gives the rows `[N, ...]` of all ranks that divide the batch, without gradients, and at which place those of
        this rank begin. Each stage sets it; None where one rank has the whole batch."""

    @classmethod
    def student_outputs(cls, config: Any, cuts: int) -> set[int]:
        """Return which outputs of the student it reads: numbers of cuts, and `cuts` for the logits."""
        return {cuts}

    @classmethod
    def teacher_outputs(cls, config: Any, cuts: int) -> set[int]:
        """Return which outputs of the teacher it reads, numbered alike."""
        return set()

    def learn(self, batches: Iterator[Tensor], teacher: Callable[[Tensor], Tensor]) -> None:
        """Learn what the loss needs before the first step of a run, and keep it in buffers.

        `batches` are images `[N, C, H, W]` as training shows them, without end; `teacher` gives logits for such ones,
        without gradients. It is called again where a run is resumed before its first step, with what it learned.
        """

    def prepare(self, batch: StepBatch) -> StepBatch:
        """Return the batch that the step is to compute, where it is another than what was loaded."""
        return batch

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        """Return the weighted loss, 0-dim; products are those of float32.

        `student` has what `student_outputs` asked for, `[N, ...]`, as the step computed it. `network` computes the same
        from another input.
        """
        raise NotImplementedError


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, if it is in less."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def mean_pooling(grid: Sequence[int], wanted: Sequence[int]) -> nn.Module:
    """Make what pools maps of so many rows and columns, `grid`, to those `wanted` by the mean. Only where sizes do not
    divide torch's adaptive pooling does it, whose gradients a GPU adds up in any order."""
    (rows, odd), (columns, odd_too) = (divmod(size, less) for size, less in zip(grid, wanted))
    if odd or odd_too:
        return nn.AdaptiveAvgPool2d((wanted[0], wanted[1]))
    return nn.AvgPool2d((rows, columns))


def last_cut(name: str, cuts: int) -> int:
    """Return the number of the last cut, where the embedding lies. Raises ConfigError for networks that are not cut."""
    if cuts == 0:
        raise ConfigError(f"{name} reads the embedding at the last cut, but the networks are not cut; give --cuts.")
    return cuts - 1


def embedding(features: Tensor, channel_axis: int = 1) -> Tensor:
    """Return features `[N, C, ...]`, with channels at `channel_axis`, as their mean over all places, `[N, C]`."""
    features = wide(features)
    if features.dim() == 2:
        return features
    return features.movedim(channel_axis, 1).flatten(2).mean(2)
