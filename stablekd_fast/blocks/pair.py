"""Cut a teacher and a student into paired blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stablekd_fast.blocks.bridge import Bridge, fit_bridge
from stablekd_fast.blocks.check import (
    check_disjoint,
    check_evaluation,
    check_separate,
    check_training,
    run_through,
)
from stablekd_fast.blocks.layout import Layout, Resampling, layout_of
from stablekd_fast.blocks.modes import evaluation_mode
from stablekd_fast.blocks.select import automatic_pairs, named_pairs
from stablekd_fast.blocks.trace import trace
from stablekd_fast.errors import CutError, RankError
from stablekd_fast.execution.precision import FP32, Precision
from stablekd_fast.models.outputs import LogitsOf
from stablekd_fast.models.wrappers import unwrapped


@dataclass(frozen=True)
class Cut:
    """A border between two blocks: where it lies in each network, and the shape of what crosses it per image."""

    teacher: str
    student: str
    teacher_shape: tuple[int, ...]
    student_shape: tuple[int, ...]
    teacher_channel_axis: int = 1
    student_channel_axis: int = 1

    @property
    def name(self) -> str:
        """The name of the place where it lies: one if both networks call it the same, else both."""
        return self.student if self.teacher == self.student else f"{self.teacher}/{self.student}"


@dataclass
class PairedBlocks:
    """K teacher blocks and K student blocks with the K-1 cuts and bridges between them.

    Blocks use the very parameters of `teacher` and `student`: training the blocks trains the plain student, whose
    `state_dict` keeps its own keys.
    """

    teacher: nn.Module
    student: nn.Module
    teacher_blocks: list[nn.Module]
    student_blocks: list[nn.Module]
    cuts: list[Cut]
    bridges: list[Bridge | None]
    teacher_flops: list[int]
    """FLOPs per image of each teacher block; zeros for blocks given by hand."""
    student_flops: list[int]
    """FLOPs per image of each student block; zeros for blocks given by hand."""
    precision: Precision = FP32
    """The precision in which the forward passes of both networks compute."""
    fuses_norms: bool = False
    """Whether the student trains with `fuse_norms`."""
    serving: list[nn.Module] | None = None
    """The teacher's blocks in the form in which they serve (see `serve`); None where they serve as they are."""
    folded: bool = False
    """Whether norms are folded in that form, which then rounds otherwise than the plain blocks."""
    head: str = "classifier"
    """What both networks' last output is: logits of a `classifier`, an `embedding`, or, with `none`, features that no
    loss reads."""
    averages_gradients: bool = False
    """Whether the loop that trains averages gradients over processes itself."""

    @classmethod
    def without_teacher(cls, student: nn.Module) -> PairedBlocks:
        """The student as its one block, for training from labels alone."""
        return cls.uncut(student, student)

    @classmethod
    def uncut(cls, teacher: nn.Module, student: nn.Module, teacher_input: nn.Module | None = None) -> PairedBlocks:
        """Each network as its one block, for objectives at the logits alone: any two networks will do."""
        teacher, student = unwrapped(teacher), unwrapped(student)
        teachers = _with_input(teacher_input, [LogitsOf(teacher)])
        return cls(teacher, student, teachers, [LogitsOf(student)], [], [], [0], [0])

    def __len__(self) -> int:
        return len(self.student_blocks)

    @property
    def last_is_idle(self) -> bool:
        """Whether the student's last block has nothing to train, such as the pooling behind the last cut of a network
        without a classifier."""
        return bool(self.cuts) and not any(p.requires_grad for p in self.student_blocks[-1].parameters())

    @property
    def serving_blocks(self) -> list[nn.Module]:
        """The teacher's blocks that compute its outputs."""
        return self.teacher_blocks if self.serving is None else self.serving

    def bridge_after(self, block: int) -> Bridge | None:
        """The bridge behind a block; None where the teacher's output is passed on as it is."""
        return self.bridges[block] if block < len(self.cuts) else None

    @torch.no_grad()
    def teacher_outputs(
        self, images: Tensor, wanted: Iterable[int] | None = None, known: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """Outputs of the wanted teacher blocks (all by default), bridged to the student's widths.

        One pass, only as far as needed; no teacher block runs twice. The last block's output is the logits, or the
        embedding of a teacher without a classifier. `known`
        holds outputs at cuts without a bridge, from which the teacher goes on instead of from the images.
        """
        known = known or {}
        outputs, x, at = {}, images, -1
        with self.precision.applied(images.device):
            for k in sorted(range(len(self)) if wanted is None else wanted):
                start = max((j for j in known if at < j < k), default=None)
                if start is not None:
                    x, at = known[start], start
                for block in self.serving_blocks[at + 1 : k + 1]:
                    x = block(x)
                at = k
                bridge = self.bridge_after(k)
                outputs[k] = x if bridge is None else bridge(x)
        return outputs

    def student_outputs(
        self, groups: Sequence[Sequence[int]], images: Tensor, teacher_outputs: Mapping[int, Tensor]
    ) -> list[Tensor]:
        """The student's output after every block, with gradients.

        A group of merged blocks starts from the teacher's output before it, so that no gradient leaves the group.
        Raises RankError where gradients would stay on their rank: among several processes, outside the forward
        of a DistributedDataParallel and without `averages_gradients`.
        """
        if torch.is_grad_enabled() and not self.averages_gradients and _gradients_stay():
            raise RankError(
                f"This is one of {torch.distributed.get_world_size()} processes, and blocks that are called by "
                "themselves leave gradients on their rank. Call student_outputs in the forward of a module that holds "
                "the student and is wrapped in DistributedDataParallel, or average the gradients and say so: "
                "paired.averages_gradients = True."
            )
        outputs = []
        for group in groups:
            x = images if group[0] == 0 else teacher_outputs[group[0] - 1].detach()
            for k in group:
                x = self.student_blocks[k](x)
                outputs.append(x)
        return outputs


def pair_blocks(
    teacher: nn.Module,
    student: nn.Module,
    example_input: Tensor,
    cuts: str | Sequence[str | tuple[str, str]] = "auto",
    blocks: int | None = None,
    *,
    teacher_blocks: Sequence[nn.Module] | None = None,
    student_blocks: Sequence[nn.Module] | None = None,
    bridge: str = "select",
    teacher_input: nn.Module | None = None,
) -> PairedBlocks:
    """Cut two networks into paired blocks that share the networks' own parameters.

    Args:
        teacher, student: networks that map `[N, 3, H, W]` to logits `[N, classes]` or to an embedding `[N, ...]`.
            DataParallel, DistributedDataParallel and `torch.compile` around them are taken off.
        example_input: real images `[N, 3, H, W]`, normalised. Two are enough to find the cuts; bridges are fitted to
            all of them, so give a few hundred where widths differ.
        cuts: `"auto"`, or names of modules after which to cut, in order; `(teacher name, student name)` where they
            differ.
        blocks: how many blocks `"auto"` should make; by default one per spatial size, and the classifier.
        teacher_blocks, student_blocks: block lists made by hand, for models that `torch.fx` cannot trace. They must
            compose to the models.
        teacher_input: what turns `example_input` into what the teacher wants, without parameters: another
            normalisation, say. It becomes a part of the teacher's first block.
        bridge: how to map widths where they differ: `"select"`, `"average"`, `"pca"` or `"none"` (see `fit_bridge`).

    Raises:
        CutError: a cut does not exist or does not fit, or a model cannot be traced.
        ModelError: a model cannot compute the images, or its parameters are sharded.
    """
    with torch.compiler.set_stance("force_eager"):  # parts that are compiled give other bits, and cannot be followed
        return _pair_blocks(
            unwrapped(teacher), unwrapped(student), example_input, cuts, blocks, teacher_blocks, student_blocks, bridge,
            teacher_input,
        )  # fmt: skip


def _pair_blocks(
    teacher: nn.Module,
    student: nn.Module,
    example_input: Tensor,
    cuts: str | Sequence[str | tuple[str, str]],
    blocks: int | None,
    teacher_blocks: Sequence[nn.Module] | None,
    student_blocks: Sequence[nn.Module] | None,
    bridge: str,
    teacher_input: nn.Module | None,
) -> PairedBlocks:
    check_separate(teacher, student)
    teachers = example_input if teacher_input is None else teacher_input(example_input)
    by_hand = teacher_blocks is not None or student_blocks is not None
    if by_hand:
        if teacher_blocks is None or student_blocks is None:
            raise CutError("Only one of teacher_blocks and student_blocks was given; give both.")
        parts = list(teacher_blocks), list(student_blocks)
        if len(parts[0]) != len(parts[1]) or len(parts[0]) < 2:
            raise CutError(
                f"{len(parts[0])} teacher blocks and {len(parts[1])} student blocks were given; "
                "give equally many, at least 2."
            )
        flops = [0] * len(parts[0]), [0] * len(parts[1])
        found = _cuts_of_lists(*parts, teachers, example_input)
    else:
        traced = trace(teacher, teachers), trace(student, example_input)
        pairs = automatic_pairs(*traced, blocks) if cuts == "auto" else named_pairs(*traced, list(cuts))
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        parts = tuple(network.split(points) for network, points in zip(traced, sides))
        flops = tuple(
            [b - a for a, b in zip([0, *(p.flops for p in points)], [*(p.flops for p in points), network.flops])]
            for network, points in zip(traced, sides)
        )
        found = [
            Cut(t.name, s.name, a.shape, b.shape, a.channel_axis, b.channel_axis)
            for t, s in pairs
            for a, b in [(t.layout, s.layout)]
        ]

    check_disjoint(student, parts[1])
    check_evaluation(teacher, parts[0], teachers, "teacher")
    check_evaluation(student, parts[1], example_input, "student")
    check_training(student, parts[1], example_input)
    paired = PairedBlocks(
        teacher,
        student,
        _with_input(teacher_input, list(parts[0])),
        list(parts[1]),
        found,
        [None] * len(found),
        list(flops[0]),
        list(flops[1]),
    )
    paired.bridges = _fit_bridges(paired, example_input, bridge)
    return paired


def _with_input(teacher_input: nn.Module | None, blocks: list[nn.Module]) -> list[nn.Module]:
    return blocks if teacher_input is None else [nn.Sequential(teacher_input, blocks[0]), *blocks[1:]]


def _gradients_stay() -> bool:
    """Whether there are several processes, and no DistributedDataParallel is in its forward."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    return getattr(DistributedDataParallel, "_active_ddp_module", None) is None


def _fit_bridges(paired: PairedBlocks, images: Tensor, kind: str) -> list[Bridge | None]:
    """A bridge for every cut at which width, layout or places differ, fitted to what the teacher gives for `images`."""
    layouts = [_layouts(cut, images) for cut in paired.cuts]
    needed = [
        k
        for k, (t, s) in enumerate(layouts)
        if (t.channel_axis, t.places) != (s.channel_axis, s.places) or (t.shape != s.shape and kind != "none")
    ]
    with evaluation_mode(paired.teacher):
        activations = paired.teacher_outputs(images, needed)
    bridges: list[Bridge | None] = [None] * len(paired.cuts)
    for k in needed:
        t, s = layouts[k]
        places = None if t.places == s.places else Resampling(t, s)
        bridges[k] = fit_bridge(kind, activations[k], s.channels, t.channel_axis, s.channel_axis, places)
    return bridges


def _layouts(cut: Cut, images: Tensor) -> tuple[Layout, Layout]:
    """How the teacher's and the student's activation lie at a cut."""
    size = tuple(images.shape[2:])
    return (
        layout_of(cut.teacher_shape, cut.teacher_channel_axis, size),
        layout_of(cut.student_shape, cut.student_channel_axis, size),
    )


@torch.no_grad()
def _cuts_of_lists(teacher_blocks: list, student_blocks: list, teachers: Tensor, images: Tensor) -> list[Cut]:
    shapes = []
    for blocks, given in ((teacher_blocks, teachers), (student_blocks, images)):
        holder = nn.ModuleList(blocks)
        with evaluation_mode(holder):
            shapes.append([tuple(out.shape[1:]) for out in run_through(blocks, given[:2])[:-1]])
    cuts = []
    for k, (t, s) in enumerate(zip(*shapes)):
        cut = Cut(f"block{k}", f"block{k}", t, s, -1 if len(t) == 2 else 1, -1 if len(s) == 2 else 1)
        layouts = _layouts(cut, images)
        if not layouts[0].fits(layouts[1]):
            raise CutError(
                f"Shapes differ after block {k}: the teacher carries {list(t)}, the student {list(s)} per image. "
                "Channels may differ, and the size of a grid with the image's proportions; other spatial sizes must "
                "agree. Move the border in one of the lists."
            )
        cuts.append(cut)
    return cuts


def copy_head(paired: PairedBlocks) -> bool:
    """Copy the teacher's last block into the student's if all shapes agree. Returns whether they do; networks that were
    not cut have no head of their own."""
    if not paired.cuts:
        return False
    theirs = list(paired.teacher_blocks[-1].state_dict().values())
    ours = list(paired.student_blocks[-1].state_dict().values())
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in ours]:
        return False
    with torch.no_grad():
        for mine, other in zip(ours, theirs):
            mine.copy_(other)
    return True
