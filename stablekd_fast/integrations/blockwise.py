"""StableKD in a training loop of one's own: a module that runs blocks and losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from stablekd_fast.blocks import blocks_text, pair_blocks
from stablekd_fast.engine.schedule import DECOMPOSED_SHARE, MERGED_LR, group_name, merge_neighbours
from stablekd_fast.errors import CheckpointError, ConfigError, ModelError, RankError
from stablekd_fast.integrations.rows import TeacherRows
from stablekd_fast.integrations.terms import Terms
from stablekd_fast.integrations.views import SAMPLE, VIEW, SampleViews

EXAMPLES = 256
"""So many images of a data set are taken to fit bridges."""


class BlockwiseOutput(NamedTuple):
    """What `Blockwise` gives for a batch; the loss is the first field, where Hugging Face's Trainer looks for it."""

    loss: Tensor
    """The sum of the terms: 0-dim, float32 (float64 for float64 networks), with a graph."""
    terms: dict[str, Tensor]
    """`ce`, `kd` and `feature/CUT` for each cut, weighted: 0-dim, without a graph, on the networks' device."""
    logits: Tensor
    """The last block's, `[N, classes]`, without a graph: while the student is decomposed, that block reads the
    teacher's activation."""


class Blockwise(nn.Module):
    """A student that learns block by block from a teacher, and later end to end (StableKD: arXiv 2312.13223).

    Its parameters are the student's own; in evaluation mode it is the plain student. The teacher is no part of its
    parameters and of its state dict, but goes with it to another device or type.

    Args:
        teacher, student: image classifiers that map `[N, 3, H, W]` to logits `[N, classes]`, see `pair_blocks`.
        images: real images `[N, 3, H, W]`, normalised, to which bridges are fitted: a few hundred where widths differ.
            Or the training data as `SampleViews`, of which some are taken.
        epochs: how many epochs the loop has.
        cuts, blocks, bridge, teacher_input: how the networks are cut, see `pair_blocks`.
        share: the part of the epochs in which every block learns alone; in the rest the student is merged.
        merged_rate: the factor of the learning rate for the merged student, see `rate_at`.
        feature, feature_options, logits, logits_options: the losses at the cuts and at the head by their names in
            `stablekd distill`, and their options, e.g. `feature_options={"weight": 2.0}` and
            `logits_options={"temperature": 4.0, "kl_weight": 0.1, "ce_weight": 1.0}`.
        rows: a folder in which the teacher's outputs are kept by sample and view, so that it does not run when a view
            is shown again. Needs `images` to be `SampleViews`.
        codec, logits_codec: how exactly they are kept, see `CacheSettings`; with fp32 from rows come the live
            teacher's numbers.
        disk_budget: most bytes in the folder, e.g. 200GB.

    Raises ConfigError for settings that cannot be used, and what `pair_blocks` raises.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        images: Tensor | SampleViews,
        epochs: float,
        *,
        cuts: str | Sequence[str | tuple[str, str]] = "auto",
        blocks: int | None = None,
        bridge: str = "select",
        teacher_input: nn.Module | None = None,
        share: float = DECOMPOSED_SHARE,
        merged_rate: float = MERGED_LR,
        feature: str = "mse",
        feature_options: Mapping[str, Any] | None = None,
        logits: str = "kd",
        logits_options: Mapping[str, Any] | None = None,
        rows: str | None = None,
        codec: str = "fp32",
        logits_codec: str = "fp32",
        disk_budget: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1 or epochs <= 0 or merged_rate <= 0:
            raise ConfigError(
                f"epochs={epochs}, share={share} and merged_rate={merged_rate} were given; epochs and merged_rate must "
                "be greater than 0, share between 0 and 1."
            )
        self.views = images if isinstance(images, SampleViews) else None
        if rows is not None and self.views is None:
            raise ConfigError(
                f"rows={rows!r} was given with images that have no names, so that rows could not be found again; make "
                "the training data SampleViews (stablekd_fast.integrations.views), whose views have keys, and give "
                "that object in the place of the images."
            )
        example = _examples(images, teacher) if isinstance(images, SampleViews) else images
        self.paired = pair_blocks(teacher, student, example, cuts, blocks, bridge=bridge, teacher_input=teacher_input)
        self.student = self.paired.student
        self.bridges = nn.ModuleDict({str(k): b for k, b in enumerate(self.paired.bridges) if b is not None})
        self.terms = Terms(self.paired, feature, feature_options, logits, logits_options)
        self.epochs, self.share, self.merged_rate = epochs, share, merged_rate
        self.epoch: int | None = None
        """The epoch that was begun last, from 0; None before the first."""
        self.groups: list[list[int]] = []
        """The numbers of the blocks that train together in this epoch."""
        self._rows = None
        if rows is not None and self.views is not None:
            self._rows = TeacherRows(self.views, rows, codec, logits_codec, disk_budget)

    def groups_at(self, epoch: int) -> list[list[int]]:
        """Return which blocks train together in an epoch, counted from 0: each alone, or all as one."""
        return merge_neighbours(len(self.paired))[0 if epoch < self.share * self.epochs else -1]

    def rate_at(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch: `merged_rate` after the merge, 1 before it, and 1
        throughout where nothing merges. `LambdaLR(optimizer, blockwise.rate_at)` takes it."""
        merges = self.share > 0 and len(self.paired) > 1
        return self.merged_rate if merges and epoch >= self.share * self.epochs else 1.0

    @property
    def rate(self) -> float:
        """The factor of the learning rate in this epoch."""
        self._check_begun()
        assert self.epoch is not None
        return self.rate_at(self.epoch)

    def begin(self, epoch: int, groups: Sequence[Sequence[int]] | None = None) -> None:
        """Begin an epoch, counted from 0, before the loader makes its batches.

        It puts the student into training mode and the teacher into evaluation mode, chooses the groups of blocks
        (`groups_at`, or those that are given: all blocks once each, in order), and the view that `SampleViews` shows.
        Raises ConfigError for a negative epoch and for other groups.
        """
        if epoch < 0:
            raise ConfigError(f"Epoch {epoch} was begun; epochs are counted from 0.")
        self._choose(epoch, groups)
        self._check_shared()
        self.train()
        nn.ModuleList([self.paired.teacher, *self.paired.teacher_blocks]).eval()
        if self.views is not None:
            self.views.set_epoch(epoch)
        if self._rows is not None:
            self._rows.refresh()

    def forward(
        self, images: Tensor, labels: Tensor | None = None, keys: Tensor | Mapping[str, Tensor] | None = None
    ) -> BlockwiseOutput:
        """Return the losses of a batch; in evaluation mode, what the plain student returns for the images.

        Args:
            images: `[N, 3, H, W]`, normalised.
            labels: int64 `[N]`, or probabilities `[N, classes]`; None leaves the cross entropy out.
            keys: where rows are kept, what `SampleViews` gives with each batch (`sample_id` and `view`), or the sample
                ids alone, int64 `[N]`, which stand for the epoch's view.

        Raises ConfigError before the first `begin`, in evaluation mode with labels, and for batches without keys where
        rows are kept.
        """
        if not self.training:
            if labels is not None:
                raise ConfigError(
                    "Blockwise was called with labels in evaluation mode, in which it is the plain student; call it "
                    "with images alone to validate, or begin(epoch) to train."
                )
            return self.student(images)
        self._check_ready()
        known = self._known(images, keys)
        try:
            outputs = self.paired.student_outputs(self.groups, images, known)
        except RankError as error:
            raise RankError(
                f"This is one of {torch.distributed.get_world_size()} processes, whose gradients nobody averages; wrap "
                "Blockwise in DistributedDataParallel (not in FSDP, which shards parameters) and call that. A loop "
                "that averages gradients itself says so: blockwise.paired.averages_gradients = True."
            ) from error
        terms = self.terms(outputs, known, labels)
        loss = torch.stack(list(terms.values())).sum()
        return BlockwiseOutput(loss, {name: term.detach() for name, term in terms.items()}, outputs[-1].detach())

    def close(self) -> None:
        """Finish the files of rows and let go of them, at the end of training."""
        if self._rows is not None:
            self._rows.close()

    def train(self, mode: bool = True) -> Blockwise:
        """Put the student into training mode, or evaluation mode; the teacher stays in evaluation mode."""
        for block in self.paired.student_blocks:
            block.train(mode)
        return super().train(mode)  # the student last, which may keep parts of it in evaluation mode

    def get_extra_state(self) -> Tensor:
        """Return what the state dict holds besides student and bridges, as JSON in uint8: safetensors takes tensors
        only."""
        state = {"cuts": self._cut_names(), "epoch": self.epoch, "groups": self.groups}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where the state was saved. Raises CheckpointError where the networks were cut elsewhere."""
        held = json.loads(bytes(state.tolist()))
        if held["cuts"] != self._cut_names():
            raise CheckpointError(
                f"The state is of blocks that end at {held['cuts']}, these end at {self._cut_names()}; give the cuts "
                "by name: cuts=[(teacher's, student's), ...]."
            )
        self.close()  # rows belong to the bridges
        if held["epoch"] is not None:
            self._choose(held["epoch"], held["groups"])

    def __repr__(self) -> str:
        apart = self.share * self.epochs
        now = "not begun" if self.epoch is None else f"epoch {self.epoch}: {'|'.join(map(group_name, self.groups))}"
        kept = "" if self._rows is None else f", rows in {self._rows.settings.directory}"
        head = f"Blockwise: {apart:g} of {self.epochs:g} epochs decomposed, {now}{kept}"
        return f"{head}\n{blocks_text(self.paired)}"

    def _apply(self, fn, recurse: bool = True):
        """Move the teacher too, and what blocks hold by themselves."""
        moved = super()._apply(fn, recurse)
        for module in (self.paired.teacher, *self.paired.teacher_blocks, *self.paired.student_blocks):
            module._apply(fn, recurse)
        self._check_shared()
        return moved

    def _cut_names(self) -> list[list[str]]:
        return [[cut.teacher, cut.student] for cut in self.paired.cuts]

    def _choose(self, epoch: int, groups: Sequence[Sequence[int]] | None) -> None:
        chosen = self.groups_at(epoch) if groups is None else [list(group) for group in groups]
        count = len(self.paired)
        if [k for group in chosen for k in group] != list(range(count)) or not all(chosen):
            raise ConfigError(
                f"groups={groups} were given; the blocks 0 to {count - 1} must be there once each, in order."
            )
        self.epoch, self.groups = epoch, chosen

    def _known(self, images: Tensor, keys: Tensor | Mapping[str, Tensor] | None) -> dict[int, Tensor]:
        if self._rows is None:
            return self.paired.teacher_outputs(images)
        if isinstance(keys, Tensor) and self.views is not None and self.epoch is not None:
            keys = {SAMPLE: keys, VIEW: torch.full_like(keys, self.views.view_of(self.epoch))}
        return self._rows.outputs(self.paired, images, keys if isinstance(keys, Mapping) else None)

    def _check_begun(self) -> None:
        if self.epoch is None:
            raise ConfigError(
                "No epoch was begun, so that the groups of blocks are unknown; call begin(epoch) before each epoch, "
                "counted from 0."
            )

    def _check_ready(self) -> None:
        self._check_begun()
        if getattr(self, "_is_replica", False):
            raise ModelError(
                "Blocks cannot be copied to several GPUs by DataParallel; use DistributedDataParallel with a process "
                "for each GPU, or one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        if not self.student.training:
            raise ConfigError(
                "The student is in evaluation mode, as validation leaves it; call begin(epoch), or train(), before "
                "training goes on."
            )

    def _check_shared(self) -> None:
        """Raise ModelError where the student is no longer made of the parts that the blocks are made of."""
        own = {id(module) for module in self.student.modules()} | {id(p) for p in self.student.parameters()}
        for block in self.paired.student_blocks:
            strangers = [name for name, value in block.named_parameters() if id(value) not in own]
            strangers += [name for name, part in block.named_modules() if _is_layer(part) and id(part) not in own]
            if strangers:
                raise ModelError(
                    f"{strangers[0]} of the student was replaced after the networks were cut, by SyncBatchNorm, "
                    "sharding (FSDP) or the like, and its block would train the old one; change the student first, "
                    "then make Blockwise of it. Sharded parameters cannot be cut: use DistributedDataParallel."
                )


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a module of the network's own that holds tensors, and not a block or a folder of layers in one."""
    holds = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
    return holds and type(module) is not nn.Module and not isinstance(module, fx.GraphModule)


def _examples(views: SampleViews, teacher: nn.Module) -> Tensor:
    """Return images of a data set, taken evenly from it, where the teacher is."""
    device = next((tensor.device for tensor in teacher.parameters()), torch.device("cpu"))
    count = len(views)
    chosen = torch.linspace(0, count - 1, min(EXAMPLES, count), dtype=torch.float64).round().long().unique()
    return views.source.batch(chosen.numpy(), 0).pixels.to(device)
