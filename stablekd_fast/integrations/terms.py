"""The engine's losses as scalars that autograd knows, for loops that start backward from their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import objective


class Terms:
    """The losses of a student in blocks: `ce` and `kd` at the head, `feature/CUT` at each cut.

    Args:
        paired: the blocks.
        feature, feature_options, logits, logits_options: the objectives and their options, as `stablekd distill` takes
            them.

    Raises ConfigError for an unknown objective or option.
    """

    def __init__(
        self,
        paired: PairedBlocks,
        feature: str,
        feature_options: Mapping[str, Any] | None,
        logits: str,
        logits_options: Mapping[str, Any] | None,
    ) -> None:
        self.paired = paired
        self.feature = objective("feature", feature, dict(feature_options or {}))
        head = objective("logits", logits, dict(logits_options or {}))
        self.ce_weight: float = getattr(head.config, "ce_weight", 0.0)
        self.smoothing: float = getattr(head.config, "label_smoothing", 0.0)
        self.has_kd = getattr(head.config, "kl_weight", 1.0) > 0
        # The cross entropy is a term of its own.
        alone = self.ce_weight and self.has_kd
        self.head = dataclasses.replace(head, config=dataclasses.replace(head.config, ce_weight=0.0)) if alone else head

    def __call__(
        self, outputs: Sequence[Tensor], known: Mapping[int, Tensor], labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the weighted losses of a batch by name, 0-dim with a graph.

        Args:
            outputs: the student's after every block; the last one is its logits `[N, classes]`.
            known: the teacher's by number, bridged to the student's widths.
            labels: int64 `[N]`, or probabilities `[N, classes]`; None leaves out the cross entropy.

        Among processes the features are brought to the scale of the whole batch, as the engine does.
        """
        *features, logits = outputs
        terms, wholes = {}, self._of_whole_batch(known)
        if labels is not None and self.ce_weight:
            wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            terms["ce"] = self.ce_weight * F.cross_entropy(wide, labels, label_smoothing=self.smoothing)
        if self.has_kd:
            self._check_labels(labels)
            terms["kd"] = _scalar(logits, known[len(features)], lambda s, t: self.head(s, t, labels))
        for k, (feature, cut) in enumerate(zip(features, self.paired.cuts)):
            terms[f"feature/{cut.name}"] = _scalar(
                feature,
                known[k],
                lambda s, t, axis=cut.student_channel_axis, whole=wholes[k]: self.feature(s, t, axis, whole),
            )
        if not terms:
            raise ConfigError(
                "The batch came without labels, the teacher's logits have no weight (kl_weight=0), and there is no "
                "cut: nothing is left to learn; give labels."
            )
        return terms

    def _check_labels(self, labels: Tensor | None) -> None:
        if labels is None and self.head.needs_classes:
            raise ConfigError(
                f"The loss {self.head.name} needs the class of each image, but the batch came without labels; give "
                "them, or use logits='kd', which does without."
            )

    def _of_whole_batch(self, known: Mapping[int, Tensor]) -> list[Tensor | None]:
        """Return for each cut what its loss needs of the whole batch where processes divide that; else None."""
        cuts = range(len(self.paired.cuts))
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if active is None and not self.paired.averages_gradients:
            return [None for _ in cuts]
        group = None if active is None else active.process_group
        ranks = torch.distributed.get_world_size(group)
        values = [self.feature.whole_batch(known[k]) for k in cuts]
        own = [value for value in values if value is not None]
        if ranks == 1 or not own:
            return [None for _ in cuts]
        together = torch.stack(own)
        torch.distributed.all_reduce(together, group=group)
        means = iter((together / ranks).unbind())
        return [None if value is None else next(means) for value in values]


def _scalar(student: Tensor, target: Tensor, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss of a function that gives loss and gradient, 0-dim with a graph.

    Gradients in float16 are rounded after they are multiplied by what comes from above, such as a scaler's factor:
    that of a mean over a large map is too small for float16.
    """
    if student.dtype == torch.float16:
        student, target = student.float(), target.float()
    loss: Tensor = _WithGradient.apply(student, target, function)  # pyright: ignore[reportAssignmentType]
    return loss


class _WithGradient(torch.autograd.Function):
    """A loss that comes with its gradient, made in one pass."""

    @staticmethod
    def forward(ctx, student: Tensor, target: Tensor, function) -> Tensor:
        loss, gradient = function(student, target)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        if upstream.device.type == "cpu" and float(upstream) == 1.0:
            return gradient, None, None
        return (gradient * upstream).to(gradient.dtype), None, None
