"""Fixed linear maps from the teacher's width, layout and grid to the student's at a cut.

The mapped activation is both the input of block k and the target of block k-1, so a merge needs no change and no
gradient leaves its group. A bridge is training-only state: it is kept in checkpoints and absent from the student.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stablekd_fast.blocks.layout import Resampling
from stablekd_fast.errors import ConfigError

FITTED = ("select", "average", "pca")
KINDS = (*FITTED, "none")


class Bridge(nn.Module):
    """Maps a teacher activation to the student's width, layout and, where these differ, places."""

    weight: Tensor | None
    """`[student width, teacher width]`; None where only the layout differs."""

    def __init__(
        self,
        weight: Tensor | None,
        teacher_axis: int = 1,
        student_axis: int = 1,
        kind: str = "given",
        places: Resampling | None = None,
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.teacher_axis, self.student_axis, self.kind, self.places = teacher_axis, student_axis, kind, places

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C_teacher, ...]` (or channels last) to `[N, C_student, ...]` in the student's layout."""
        x = x.movedim(self.teacher_axis, -1)
        if self.places is not None and self.places.shrinks:
            x = self.places(x)
        if self.weight is not None:
            x = nn.functional.linear(x, self.weight.to(x.dtype))
        if self.places is not None and not self.places.shrinks:
            x = self.places(x)
        return x.movedim(-1, self.student_axis)

    def extra_repr(self) -> str:
        shape = "layout only" if self.weight is None else f"{self.weight.shape[1]} -> {self.weight.shape[0]}"
        return f"{self.kind}, {shape}{'' if self.places is None else f', {self.places.extra_repr()}'}"


def fit_bridge(
    kind: str,
    activation: Tensor,
    student_width: int,
    teacher_axis: int,
    student_axis: int,
    places: Resampling | None = None,
) -> Bridge:
    """Fit a bridge to teacher activations of a calibration batch; `places` maps their places, where these differ.

    - `select`: as many teacher channels as the student has, chosen to leave least of the other channels unexplained
      (pivoted Cholesky of the second moments). Signs and scale stay as they are, so a student block that ends in ReLU
      can reach its target.
    - `average`: every teacher channel joins the selected channel that it is most similar to, and each group is
      averaged. The values stay non-negative too.
    - `pca`: principal directions of the uncentred second moments. They keep most power, but have negative values.
    - `none`: widths stay as they are, for losses that can do with any; nothing can be fed to the student.

    A student wider than its teacher gets the teacher's channels repeated, whatever the kind.
    Raises ConfigError for an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"bridge {kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    samples = activation.detach().movedim(teacher_axis, -1).flatten(0, -2).double()
    moments = samples.T @ samples / len(samples)
    teacher_width = len(moments)
    eye = torch.eye(teacher_width, dtype=torch.float64, device=moments.device)
    if student_width == teacher_width or kind == "none":
        weight, kind = None, "layout"
    elif student_width > teacher_width:
        weight, kind = eye[torch.arange(student_width, device=eye.device) % teacher_width], "repeat"
    elif kind == "pca":
        weight = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :student_width].T
        weight = weight * torch.sign(weight.sum(1, keepdim=True))
    else:
        chosen = _pivot_channels(moments, student_width)
        weight = eye[chosen]
        if kind == "average":
            weight = _group_means(moments, chosen)
    return Bridge(weight if weight is None else weight.float().contiguous(), teacher_axis, student_axis, kind, places)


def _pivot_channels(moments: Tensor, count: int) -> Tensor:
    """Choose greedily: each step takes the channel with most power left after projecting out those taken before."""
    residual, chosen = moments.clone(), []
    for _ in range(count):
        power = residual.diagonal().clone()
        power[chosen] = -1.0
        pivot = int(power.argmax())
        chosen.append(pivot)
        if residual[pivot, pivot] > 0:
            residual -= torch.outer(residual[:, pivot], residual[pivot]) / residual[pivot, pivot]
    return torch.tensor(sorted(chosen), device=moments.device)


def _group_means(moments: Tensor, chosen: Tensor) -> Tensor:
    """A weight `[len(chosen), channels]` that averages every channel with the chosen one that it is most similar to."""
    norms = moments.diagonal().clamp_min(1e-12).sqrt()
    similarity = moments[:, chosen] / (norms[:, None] * norms[chosen])
    member = similarity.argmax(1)
    member[chosen] = torch.arange(len(chosen), device=moments.device)
    weight = nn.functional.one_hot(member, len(chosen)).T.double()
    return weight / weight.sum(1, keepdim=True)
