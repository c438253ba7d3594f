"""Parts for torchdistill (github.com/yoshitomo-matsubara/torchdistill). Importing this module registers them; a
config of its does so itself:

    dependencies:
      - stablekd_fast.integrations.torchdistill

- Losses. `FastKDLoss` takes the settings of torchdistill's `KDLoss` and gives its values, `FastDKDLoss` is like it;
  `FastMSELoss`, `FastCosineLoss` and `FastKLDivWithLogitsLoss` are `stablekd_fast.losses`, for its `SimpleLossWrapper`.
- `SampleViews`, a data set whose random views have keys, and the process `begin_view` that names each epoch's.
- Model wrappers `StableKDTeacher` (in one pass, or from rows by sample and view) and `StableKDStudent` (decomposed or
  merged), which share one `SharedBlocks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from stablekd_fast.errors import ConfigError
from stablekd_fast.integrations.shared import SharedBlocks
from stablekd_fast.integrations.views import SampleViews
from stablekd_fast.losses import CosineLoss, DKDLoss, KDLoss, KLDivWithLogitsLoss, MSELoss

try:
    from torchdistill.core.interfaces.pre_epoch_proc import default_pre_epoch_process_with_teacher
    from torchdistill.core.interfaces.registry import register_pre_epoch_proc_func
    from torchdistill.losses.registry import register_low_level_loss, register_mid_level_loss
    from torchdistill.models.registry import register_auxiliary_model_wrapper
    from torchdistill.models.wrapper import AuxiliaryModelWrapper
except ImportError as error:
    raise ConfigError(f"torchdistill cannot be imported ({error}); `pip install torchdistill`.") from error

__all__ = [
    "FastDKDLoss",
    "FastKDLoss",
    "SampleViews",
    "SharedBlocks",
    "StableKDStudent",
    "StableKDTeacher",
    "begin_view",
]

register_low_level_loss(MSELoss, key="FastMSELoss")
register_low_level_loss(CosineLoss, key="FastCosineLoss")
register_low_level_loss(KLDivWithLogitsLoss, key="FastKLDivWithLogitsLoss")


class _LogitsLoss(nn.Module):
    """The base of losses that find both networks' logits as torchdistill's do."""

    def __init__(
        self, student_module_path: str, student_module_io: str, teacher_module_path: str, teacher_module_io: str
    ) -> None:
        super().__init__()
        self.student_place = student_module_path, student_module_io
        self.teacher_place = teacher_module_path, teacher_module_io

    def logits(self, student: Mapping, teacher: Mapping) -> tuple[Tensor, Tensor]:
        (student_path, student_io), (teacher_path, teacher_io) = self.student_place, self.teacher_place
        return student[student_path][student_io], teacher[teacher_path][teacher_io]


@register_mid_level_loss
class FastKDLoss(_LogitsLoss):
    """torchdistill's KDLoss: `alpha` * cross entropy + `beta` (1 - alpha by default) * T^2 * KL.

    As there, with `alpha` None or 0, or without targets, the divergence stands alone, without `beta` and T^2. Of its
    settings, reductions other than `batchmean` and those of CrossEntropyLoss other than `label_smoothing` are refused.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        label_smoothing: float = 0.0,
        **unsupported,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        if reduction != "batchmean" or unsupported:
            raise ConfigError(
                f"FastKDLoss was given reduction={reduction!r} and {unsupported or 'nothing else'}; "
                "it has the reduction batchmean and label_smoothing. Use torchdistill's KDLoss for others."
            )
        self.divergence = KLDivWithLogitsLoss(reduction, temperature)
        self.both: KDLoss | None = None
        if alpha:
            self.both = KDLoss(temperature, 1 - alpha if beta is None else beta, alpha, label_smoothing=label_smoothing)

    def forward(
        self, student_io_dict: Mapping, teacher_io_dict: Mapping, targets: Tensor | None = None, *args, **kwargs
    ) -> Tensor:
        student, teacher = self.logits(student_io_dict, teacher_io_dict)
        if self.both is None or targets is None:
            return self.divergence(student, teacher) / self.divergence.temperature**2
        return self.both(student, teacher, targets)


@register_mid_level_loss
class FastDKDLoss(_LogitsLoss):
    """T^2 * (`alpha` * TCKD + `beta` * NCKD); the cross entropy is a term of its own."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        self.loss = DKDLoss(temperature, alpha, beta)

    def forward(self, student_io_dict: Mapping, teacher_io_dict: Mapping, targets: Tensor, *args, **kwargs) -> Tensor:
        return self.loss(*self.logits(student_io_dict, teacher_io_dict), targets)


@register_pre_epoch_proc_func
def begin_view(self, epoch: int | None = None, **kwargs) -> None:
    """torchdistill's own process before an epoch, and the number of the epoch for the data set's views."""
    default_pre_epoch_process_with_teacher(self, epoch=epoch, **kwargs)
    dataset = self.train_data_loader.dataset
    if epoch is None or not isinstance(dataset, SampleViews):
        raise ConfigError(
            f"begin_view was called for epoch {epoch} of {type(dataset).__name__}; it needs the epoch's number and the "
            "training data as SampleViews, with requires_supp: False in train_data_loader."
        )
    dataset.set_epoch(epoch)


class _Tapped(AuxiliaryModelWrapper):
    """A wrapper that offers values under the names of the modules that give them, which themselves are not called."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        for name in names:
            *parents, last = name.split(".")
            holder = self
            for parent in parents:
                if not hasattr(holder, parent):
                    holder.add_module(parent, nn.Module())
                holder = getattr(holder, parent)
            holder.add_module(last, nn.Identity())

    def offer(self, values: Sequence[Tensor]) -> None:
        for name, value in zip(self._names, values):
            self.get_submodule(name)(value)


@register_auxiliary_model_wrapper
class StableKDTeacher(_Tapped):
    """A teacher in evaluation mode, of which no block runs twice for a batch, or none at all where rows are kept.

    Use it with `requires_grad: False`, and where rows are kept with `forward_proc: forward_batch_supp_dict`.
    """

    def __init__(self, teacher_model: nn.Module, shared: SharedBlocks, **kwargs) -> None:
        super().__init__([teacher for teacher, _ in shared.cuts])
        self.teacher_model, self.shared = teacher_model, shared
        shared.attach(teacher=teacher_model)
        self.eval()

    def train(self, mode: bool = True) -> StableKDTeacher:
        return super().train(False)

    def forward(self, images: Tensor, keys: Mapping[str, Tensor] | None = None) -> Tensor:
        *features, logits = self.shared.teacher_outputs(images, keys)
        self.offer(features)
        return logits


@register_auxiliary_model_wrapper
class StableKDStudent(_Tapped):
    """A student whose groups of blocks train on the teacher's activations, each alone; in evaluation the plain student.

    `groups`: neighbouring blocks that train together, counted from 0, e.g. `[[0], [1], [2]]`, and `[[0, 1, 2]]` in a
    later stage. Its state dict is that of the plain student.
    """

    def __init__(
        self, student_model: nn.Module, shared: SharedBlocks, groups: Sequence[Sequence[int]], **kwargs
    ) -> None:
        super().__init__([student for _, student in shared.cuts])
        self.student_model, self.shared, self.groups = student_model, shared, groups
        if [k for group in groups for k in group] != list(range(len(shared.cuts) + 1)):
            raise ConfigError(
                f"groups={groups} were given; {len(shared.cuts)} cuts make the blocks 0 to {len(shared.cuts)}, "
                "which must be there once each, in order."
            )
        shared.attach(student=student_model)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.student_model(images)
        *features, logits = self.shared.student_outputs(self.groups, images)
        self.offer(features)
        return logits

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.student_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.student_model.load_state_dict(*args, **kwargs)
