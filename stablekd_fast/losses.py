"""Losses as modules, for training loops of one's own: the signatures people use, computed by `stablekd_fast.kernels`.

All give a 0-dim tensor in float32 (float64 for float64 inputs) whatever the inputs' precision, are differentiable
twice, and run on CPUs and NVIDIA GPUs. None has parameters; `ContrastiveLoss` has a memory in its buffers. Tensors that
do not fit raise OperandError, settings ConfigError.

Reductions are torch's: `"batchmean"` divides a sum over all elements by the batch size, `"mean"` by the number of
elements, `"sum"` by nothing. `"none"` is not supported: the kernels never write the single terms. All are instances of
torch's own base class of losses, as tools that check their criteria want it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from stablekd_fast import kernels
from stablekd_fast.errors import ConfigError
from stablekd_fast.kernels._checks import OperandError
from stablekd_fast.kernels.feature_cosine import Per
from stablekd_fast.kernels.feature_mse import Normalize

Reduction = Literal["batchmean", "mean", "sum"]


class KLDivWithLogitsLoss(_Loss):
    """T^2 * KL(target || input) between the softmax distributions of two logits at temperature T.

    What `nn.KLDivLoss(reduction)(log_softmax(input / T, 1), softmax(target / T, 1)) * T**2` computes. It takes logits,
    so take the softmax calls out when it replaces `nn.KLDivLoss`; and its default reduction is `"batchmean"`, the
    divergence's own, where that of `nn.KLDivLoss` is `"mean"`, which divides by the classes too.

    `axis`: that of the classes; None takes the last of `[B, T, V]` (tokens), and 1 of `[N, C]` and `[N, C, H, W]`
    (pixels). Logits whose classes do not lie side by side in memory are copied.
    """

    def __init__(self, reduction: Reduction = "batchmean", temperature: float = 1.0, axis: int | None = None) -> None:
        super().__init__()
        _check_reduction(reduction, ("batchmean", "mean", "sum"))
        _check_temperature(temperature)
        self.reduction, self.temperature, self.axis = reduction, temperature, axis

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """`input` (the student's) and `target` (the teacher's) are logits `[N, C]`, `[B, T, V]` or `[N, C, H, W]`."""
        if input.shape != target.shape or input.dim() < 2:
            raise OperandError(
                f"KLDivWithLogitsLoss was given {list(input.shape)} and {list(target.shape)}; it needs logits of one "
                "shape, with an axis of classes besides that of the batch."
            )
        axis = (-1 if input.dim() == 3 else 1) if self.axis is None else self.axis
        rows, targets = (logits.movedim(axis, -1).flatten(0, -2) for logits in (input, target))
        loss = kernels.kd_loss(rows, targets, temperature=self.temperature)
        if self.reduction == "mean":
            return loss / rows.shape[1]
        return loss * len(rows) if self.reduction == "sum" else loss * (len(rows) / len(input))

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, temperature={self.temperature}"


class KDLoss(_Loss):
    """alpha * T^2 * KL(teacher || student at temperature T) + (1 - alpha) * cross entropy, averaged over the batch.

    Hinton, Vinyals, Dean: arXiv 1503.02531. `beta` may replace 1 - alpha as the cross entropy's weight.
    """

    def __init__(
        self, temperature: float = 4.0, alpha: float = 0.9, beta: float | None = None, *, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.alpha, self.beta = temperature, alpha, 1 - alpha if beta is None else beta
        self.label_smoothing = label_smoothing
        if min(self.alpha, self.beta) < 0 or self.alpha + self.beta == 0:
            raise ConfigError(
                f"KDLoss was given the weights {self.alpha} for the divergence and {self.beta} for the cross entropy; "
                "they must not be negative, and one must be greater than 0."
            )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `[N, C]`; labels int64 `[N]`, or probabilities `[N, C]` as mixup makes them.

        Without labels the weighted divergence stands alone. There is no index that is ignored: every label is a class.
        """
        if labels is None or labels.is_floating_point():
            divergence = self.alpha * kernels.kd_loss(student_logits, teacher_logits, temperature=self.temperature)
            if labels is None:
                return divergence
            return divergence + self.beta * F.cross_entropy(
                student_logits, labels, label_smoothing=self.label_smoothing
            )
        total = self.alpha + self.beta
        loss = kernels.kd_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            alpha=self.alpha / total,
            label_smoothing=self.label_smoothing,
        )
        return loss if total == 1 else total * loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}"


class DKDLoss(_Loss):
    """T^2 * (alpha * TCKD + beta * NCKD), averaged over the batch (Zhao et al., DKD: arXiv 2203.08679).

    It has no cross entropy.
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.alpha, self.beta = temperature, alpha, beta

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `[N, C]`, labels int64 `[N]`."""
        return kernels.decoupled_kl(
            student_logits, teacher_logits, labels, temperature=self.temperature, alpha=self.alpha, beta=self.beta
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}"


class MSELoss(_Loss):
    """Mean squared error of features, as `nn.MSELoss`, or on a scale of its own.

    `normalize`: None, `"power"` (over the target's mean square), `"channel"` (both standardised by the target's
    channels) or `"l2"` (samples at unit length), see `kernels.feature_mse`; these are means, so that `"sum"` goes with
    None only. Shapes must be equal, nothing is broadcast. `channel_axis`: 1 for `[N, C, H, W]`, -1 for tokens
    `[N, T, C]`.
    """

    def __init__(
        self,
        reduction: Literal["mean", "sum"] = "mean",
        normalize: Normalize = None,
        channel_axis: int = 1,
    ) -> None:
        super().__init__()
        _check_reduction(reduction, ("mean", "sum"))
        if reduction == "sum" and normalize is not None:
            raise ConfigError(
                f"MSELoss was given reduction='sum' with normalize={normalize!r}; normalised errors are means."
            )
        self.reduction, self.channel_axis = reduction, channel_axis
        self.normalize: Normalize = normalize

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """`input` (the student's) and `target` (the teacher's) are features `[N, ...]` of one shape."""
        loss = kernels.feature_mse(input, target, normalize=self.normalize, channel_axis=self.channel_axis)
        return loss * input.numel() if self.reduction == "sum" else loss

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, normalize={self.normalize!r}"


class CosineLoss(_Loss):
    """Mean of 1 - cosine similarity of features, `per` `"position"` (over channels) or `"sample"` (flattened)."""

    def __init__(self, per: Per = "position", channel_axis: int = 1) -> None:
        super().__init__()
        self.per: Per = per
        self.channel_axis = channel_axis

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """`input` (the student's) and `target` (the teacher's) are features `[N, ...]` of one shape."""
        return kernels.feature_cosine(input, target, per=self.per, channel_axis=self.channel_axis)

    def extra_repr(self) -> str:
        return f"per={self.per!r}"


class ContrastiveLoss(_Loss):
    """InfoNCE of embeddings: mean of -log(exp(s.t / T) / sum over the teacher's embeddings of exp(s.t' / T)).

    s and t are embeddings of one sample, scaled to unit length (Wu et al., DisCo: arXiv 2112.05638). The teacher's
    embeddings are those of the batch and of a queue of `queue` earlier ones, a buffer that batches fill in training
    mode alone; 0 takes the batch alone. `width` is the teacher's; a student of another one needs a linear map, trained
    with it.

    `group`: a process group whose ranks have a part of each batch, equally many samples each. Each sample is then
    contrasted with the teacher's embeddings of all of them, and gradients averaged over the ranks are those of the
    whole batch.
    """

    def __init__(
        self, width: int, temperature: float = 0.05, queue: int = 2048, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        if width < 1 or queue < 0:
            raise ConfigError(f"width={width}, queue={queue} was given; needed are width >= 1 and queue >= 0.")
        self.temperature = temperature
        self.register_buffer("kept", torch.zeros(queue, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.kept: Tensor
        self.count: Tensor
        self.gather: Callable[[Tensor], tuple[Tensor, int]] | None = None if group is None else partial(rows_of, group)
        """What gives the rows of all ranks, and at which place this rank's begin."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """`input` (the student's) and `target` (the teacher's, which gets no gradient) are embeddings `[N, width]`."""
        width = self.kept.shape[1]
        if input.dim() != 2 or input.shape != target.shape or input.shape[1] != width:
            raise OperandError(
                f"ContrastiveLoss was given {list(input.shape)} and {list(target.shape)}; it needs embeddings "
                f"[N, {width}] twice. A student of another width needs a linear map to {width}, trained with it."
            )
        kind = torch.promote_types(input.dtype, torch.float32)
        own, teachers = (F.normalize(embeddings.to(kind), dim=1) for embeddings in (input, target.detach()))
        teachers, first = (teachers, 0) if self.gather is None else self.gather(teachers)
        remembered = self.kept.clone().to(kind)
        cosines = torch.cat([own @ teachers.T, own @ remembered.T], 1) / self.temperature
        places = torch.arange(len(teachers) + len(remembered), device=own.device)
        cosines = cosines.masked_fill(places >= len(teachers) + self.count, -torch.inf)
        if self.training and len(self.kept):
            self._keep(teachers)
        return F.cross_entropy(cosines, places[first : first + len(own)])

    @torch.no_grad()
    def _keep(self, embeddings: Tensor) -> None:
        """Let embeddings `[N, width]` take the places of the oldest in the queue."""
        newest = embeddings[: len(self.kept)]
        places = (self.count + torch.arange(len(newest), device=newest.device)) % len(self.kept)
        self.kept.index_copy_(0, places, newest.to(self.kept.dtype))
        self.count += len(newest)

    def extra_repr(self) -> str:
        return f"width={self.kept.shape[1]}, temperature={self.temperature}, queue={len(self.kept)}"


def rows_of(group: dist.ProcessGroup, rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows `[N, ...]` of all ranks of a group, one after the other, and at which place this rank's begin.

    All ranks must have equally many. No gradient passes.
    """
    gathered = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(gathered, rows.detach().contiguous(), group=group)
    return torch.cat(gathered), group.rank() * len(rows)


def _check_reduction(reduction: str, supported: tuple[str, ...]) -> None:
    if reduction not in supported:
        raise ConfigError(
            f"reduction={reduction!r} was given; this loss has {', '.join(supported)}. "
            "For single terms use torch's own loss."
        )


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} was given; it must be greater than 0.")
