"""A student that ends in its teacher's own classifier: encoder, projector, classifier (see `objectives/simkd.py`)."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from stablekd_fast import models
from stablekd_fast.blocks.check import check_runs
from stablekd_fast.blocks.layout import Layout
from stablekd_fast.blocks.pair import PairedBlocks, pair_blocks
from stablekd_fast.blocks.trace import CutPoint, TracedNetwork, trace
from stablekd_fast.errors import CutError, ModelError
from stablekd_fast.execution.memory import placed
from stablekd_fast.models.registry import REUSING, add_family
from stablekd_fast.models.wrappers import unwrapped
from stablekd_fast.objectives.auxiliary import mean_pooling

FACTOR = 2
"""How much narrower than the teacher's features the projector is inside."""


class Fixed(nn.Module):
    """A network that is not trained and stays in evaluation mode; gradients go through it to its input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.track_running_stats = False  # its statistics are read, but never estimated anew
        self.train(False)

    def train(self, mode: bool = True) -> Fixed:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network gives for `x`."""
        return self.network(x)


class ReusedClassifier(nn.Module):
    """A student with its teacher's classifier: images `[N, 3, H, W]` -> logits `[N, classes]`.

    `encoder`: images to the student's last feature map `[N, C, H, W]`; `projector`: that to the teacher's width, and
    to its grid if that is coarser; `classifier`: what the teacher does behind its last feature map. The classifier is
    not trained.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector, self.classifier = encoder, projector, Fixed(classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Return the teacher's classifier's logits for projected features."""
        return self.classifier(self.projector(self.encoder(images)))


def projector_of(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> nn.Sequential:
    """Make what maps features of the shape `student`, `(C, H, W)`, to the width of `teacher`, `[N, C', H', W']`: to
    its grid where that is coarser, else on the student's own."""
    (width, *grid), (wanted, *coarser) = student, teacher
    inside = max(wanted // FACTOR, 1)
    return nn.Sequential(
        *([mean_pooling(grid, coarser)] if grid > coarser else []),
        *_layer(width, inside, 1),
        *_layer(inside, inside, 3),
        *_layer(inside, wanted, 1),
    )


def _layer(width: int, wanted: int, size: int) -> list[nn.Module]:
    convolution = nn.Conv2d(width, wanted, size, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(wanted), nn.ReLU()]


def pair_reused(
    teacher: nn.Module, student: nn.Module, example_input: Tensor, teacher_input: nn.Module | None = None
) -> PairedBlocks:
    """Put together the student that reuses the teacher's classifier, and cut it and the teacher before the classifier.

    The encoder is that of `student`, whose parameters it shares; the classifier is a copy. The arguments are those of
    `pair_blocks`, and so are the errors. Raises CutError too where the teacher's images have another size than the
    student's, where a network has no feature map before its classifier, or where the maps do not fit.
    """
    with torch.compiler.set_stance("force_eager"):
        teacher, student = unwrapped(teacher), unwrapped(student)
        theirs = example_input if teacher_input is None else teacher_input(example_input)
        if theirs.shape != example_input.shape:
            raise CutError(
                f"The teacher's images have {theirs.shape[-1]} pixels a side, the student's "
                f"{example_input.shape[-1]}, but a student that reuses the teacher's classifier needs one size for "
                "both; give --image-size, or --teacher-image-size."
            )
        traced = trace(teacher, theirs)
        cut = _last_map(traced, "teacher")
        whole = _put_together(traced, student, example_input)
        own = trace(whole, example_input)
        border = next(point for point in own.points if "projector" in point.aliases)
        paired = pair_blocks(
            teacher, whole, example_input, bridge="none", teacher_input=teacher_input,
            teacher_blocks=traced.split([cut]), student_blocks=[own.split([border])[0], whole.classifier],
        )  # fmt: skip
    paired.cuts = [dataclasses.replace(paired.cuts[0], teacher=cut.name, student=border.name)]
    paired.teacher_flops = [cut.flops, traced.flops - cut.flops]
    paired.student_flops = [border.flops, own.flops - border.flops]
    return paired


def _put_together(teacher: TracedNetwork, student: nn.Module, images: Tensor) -> ReusedClassifier:
    """Cut the student `[N, 3, H, W]` -> `[N, classes]` and the teacher behind their last maps, and join the parts."""
    ours = trace(student, images)
    points = _last_map(ours, "student"), _last_map(teacher, "teacher")
    own, theirs = (point.layout for point in points)
    if own.grid is None or theirs.grid is None or not (_covers(own, theirs) or _covers(theirs, own)):
        raise CutError(
            f"The student's last feature map is {list(own.shape)}, the teacher's {list(theirs.shape)}: neither grid "
            "can be averaged to the other. Choose networks whose maps have the image's proportions."
        )
    classifier = copy.deepcopy(teacher.split([points[1]])[1])
    projector = placed(projector_of(_map(own), _map(theirs)), images.device)
    whole = ReusedClassifier(ours.split([points[0]])[0], projector, classifier)
    try:
        check_runs(whole, images)
    except ModelError as error:
        raise CutError(
            f"The teacher's classifier does not take the student's last feature map: the student's grid is "
            f"{list(own.grid)}, the teacher's {list(theirs.grid)}. Choose a student whose last map has at least as "
            "many places."
        ) from error
    return whole


def _covers(fine: Layout, coarse: Layout) -> bool:
    return fine.grid is not None and coarse.grid is not None and all(a >= b for a, b in zip(fine.grid, coarse.grid))


def _map(layout: Layout) -> tuple[int, int, int]:
    channels, height, width = layout.shape
    return channels, height, width


def _last_map(network: TracedNetwork, role: str) -> CutPoint:
    """The feature map that the classifier reads: that of the last convolution before it, before it is pooled.

    A map may have a single place. Raises CutError if the network carries something else than maps there.
    """
    before = [point for point in network.points if point.divides is None and point.flops < network.flops]
    maps = [point for point in before if len(point.layout.shape) == 3 and point.layout.channel_axis == 1]
    others = [point for point in before if point.layout.extended and point not in maps]
    if not maps or (others and others[-1].flops >= maps[-1].flops):
        found = f"carries {list(others[-1].layout.shape)} per image there" if others else "has no such place"
        raise CutError(
            f"A student that reuses the teacher's classifier needs a feature map [C, H, W] before the classifier of "
            f"both networks, but the {role} {found}. Choose a convolutional {role}, or another method."
        )
    last = [point for point in maps if point.flops == maps[-1].flops]  # pooling costs nothing
    most = max(math.prod(point.layout.places) for point in last)
    return [point for point in last if math.prod(point.layout.places) == most][-1]


def name_of(student: str, teacher: str) -> str:
    """Return the name by which `models.build` makes the student that reuses the teacher's classifier."""
    return f"{REUSING}{student}+{teacher}"


def build_reused(name: str, classes: int, image_size: int | None) -> nn.Module:
    """Make `simkd/STUDENT+TEACHER` with random weights, those of the classifier too: they come from a file.

    `image_size` (224 if None) is where the networks are cut. Raises ModelError for another name, or if one of the
    networks cannot be made; CutError if they do not fit.
    """
    student, plus, teacher = name.removeprefix(REUSING).partition("+")
    if not (student and plus and teacher):
        raise ModelError(
            f"There is no model {name!r}; {REUSING}STUDENT+TEACHER is a student with its teacher's classifier, for "
            f"instance {name_of('resnet20', 'resnet56')}."
        )
    size = image_size or 224
    networks = [models.build(part, classes, size) for part in (student, teacher)]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return _put_together(trace(networks[1], images), networks[0], images)


add_family(REUSING, build_reused)
