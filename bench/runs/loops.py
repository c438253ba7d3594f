"""Training loops as people write them: the rivals in `stablekd bench step` and `stablekd bench end-to-end`.

All train with a learning rate of zero, so that their losses can be checked at any time.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.data import Batch
from stablekd_fast.objectives import Objectives
from stablekd_fast.objectives.kd import LogitKD

TEMPERATURE, KL_WEIGHT = 4.0, LogitKD().kl_weight


class Loop:
    """A training loop over a few batches, as people write it; in bf16 by autocast if asked."""

    def __init__(self, batches: list[Batch], *, bf16: bool = False) -> None:
        self.batches, self.turn, self.bf16 = batches, 0, bf16
        self.device = batches[0].pixels.device.type
        self.capturing = False

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes. A graph's replay must not meet weights that were cast before."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16, cache_enabled=not self.capturing)

    def train(self) -> list[Tensor]:
        self.turn = (self.turn + 1) % len(self.batches)
        return self.step(self.batches[self.turn])

    def step(self, batch: Batch) -> list[Tensor]:
        """Train on a batch; return its losses."""
        raise NotImplementedError


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, kl_weight: float = 1.0) -> Tensor:
    log_q, p = torch.log_softmax(student / TEMPERATURE, 1), torch.softmax(teacher / TEMPERATURE, 1)
    divergence = nn.functional.kl_div(log_q, p, reduction="batchmean")
    return nn.functional.cross_entropy(student, labels) + kl_weight * TEMPERATURE**2 * divergence


class OrdinaryKD(Loop):
    """Runs the teacher's whole forward pass, and the student's forward and backward pass end to end.

    `compiled`: torch.compile makes both networks' passes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        batches: list[Batch],
        *,
        bf16: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(batches, bf16=bf16)
        self.teacher, self.student, self.optimizer = teacher.eval(), student.train(), sgd(student)
        if compiled:
            self.teacher, self.student = torch.compile(self.teacher), torch.compile(self.student)

    def step(self, batch: Batch) -> list[Tensor]:
        with self.autocast():
            with torch.no_grad():
                target = self.teacher(batch.images)
            output = self.student(batch.images)
        if self.bf16:
            output, target = output.float(), target.float()
        loss = kd_loss(output, target, batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [loss.detach()]


class PlainTraining(Loop):
    """Trains the student on labels alone, without a teacher."""

    def __init__(self, student: nn.Module, batches: list[Batch], *, bf16: bool = False) -> None:
        super().__init__(batches, bf16=bf16)
        self.student, self.optimizer = student.train(), sgd(student)

    def step(self, batch: Batch) -> list[Tensor]:
        with self.autocast():
            output = self.student(batch.images)
        loss = nn.functional.cross_entropy(output.float() if self.bf16 else output, batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [loss.detach()]


class GraphedLoop(Loop):
    """A whole step of another loop as one CUDA graph: batches are copied into its inputs, then it is replayed."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop.batches)
        self.loop = loop  # its weights live as long as the graph
        images, self.labels = loop.batches[0].pixels.clone(), loop.batches[0].labels.clone()
        self.inputs = dataclasses.replace(loop.batches[0], images=images, labels=self.labels)
        loop.capturing = True
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                loop.step(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = loop.step(self.inputs)

    def step(self, batch: Batch) -> list[Tensor]:
        self.inputs.pixels.copy_(batch.pixels)
        self.labels.copy_(batch.labels)
        self.graph.replay()
        return [loss.clone() for loss in self.losses]


LOGITS = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}
"""Where torchdistill's losses find both networks' logits."""


def torchdistill_box(
    teacher: nn.Module, student: nn.Module, kd: dict, *, lr: float = 0.0, teacher_settings: dict | None = None
):
    """Make torchdistill's distillation box with one term. `kd` holds its key, and its settings but for `LOGITS`."""
    from torchdistill.core.distillation import DistillationBox

    class Box(DistillationBox):
        def setup_data_loaders(self, train_config: dict) -> None:
            """The batches are here already."""

    term = {"criterion": {**kd, "kwargs": {**LOGITS, **kd["kwargs"]}}, "weight": 1.0}
    common = {"forward_proc": "forward_batch_only", "sequential": []}
    settings = {
        "num_epochs": 1,
        "teacher": {**common, "requires_grad": False, **(teacher_settings or {})},
        "student": {**common, "requires_grad": True},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": term}}},
        "optimizer": {"key": "SGD", "kwargs": {"lr": lr, "momentum": 0.9, "weight_decay": 5e-4}},
    }
    box = Box(teacher.eval(), student, {}, settings, torch.device("cpu"), None, False, 1)
    box.student_model.train()
    box.teacher_model.eval()
    return box


class TorchdistillKD(Loop):
    """Feeds torchdistill's distillation box, with its KD loss, as its training scripts feed it."""

    def __init__(self, teacher: nn.Module, student: nn.Module, batches: list[Batch]) -> None:
        super().__init__(batches)
        kd = {"key": "KDLoss", "kwargs": {"temperature": TEMPERATURE, "alpha": 1.0, "beta": 1.0}}
        self.box = torchdistill_box(teacher, student, kd)

    def step(self, batch: Batch) -> list[Tensor]:
        loss = self.box.forward_process(batch.images, batch.labels, {})
        self.box.post_forward_process(loss)
        return [loss.detach()]


class OrdinaryBlockwise(Loop):
    """Trains each block alone: the teacher runs from the images to the block's target, autograd through an MSE."""

    def __init__(self, paired: PairedBlocks, batches: list[Batch], *, bf16: bool = False) -> None:
        super().__init__(batches, bf16=bf16)
        self.paired = paired
        nn.ModuleList(paired.student_blocks).train()
        self.optimizers = [sgd(block) for block in paired.student_blocks]

    def step(self, batch: Batch) -> list[Tensor]:
        losses, last = [], len(self.paired.cuts)
        for k, (block, optimizer) in enumerate(zip(self.paired.student_blocks, self.optimizers)):
            with self.autocast():
                known = self.paired.teacher_outputs(batch.images, {k - 1, k} - {-1})
                output = block(batch.images if k == 0 else known[k - 1])
            if self.bf16:
                output, known[k] = output.float(), known[k].float()
            loss = kd_loss(output, known[k], batch.labels) if k == last else nn.functional.mse_loss(output, known[k])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses


class OrdinaryStage(Loop):
    """Trains a stage of any method.

    One pass of the teacher keeps its features; then comes each group's forward pass, losses by autograd, backward pass
    and update. `objectives` says what is aligned to what; the weights are the defaults.
    """

    def __init__(
        self,
        paired: PairedBlocks,
        groups: list[list[int]],
        objectives: Objectives,
        batches: list[Batch],
        *,
        bf16: bool = False,
    ) -> None:
        super().__init__(batches, bf16=bf16)
        self.paired, self.groups = paired, groups
        self.use_teacher_logits = objectives.use_teacher_logits
        self.last = len(paired.cuts)
        self.aligned = [objectives.aligned_cuts(group, self.last) for group in groups]
        self.wanted = objectives.teacher_outputs(groups, self.last)
        blocks = paired.student_blocks
        nn.ModuleList(blocks).train()
        self.optimizers = [
            torch.optim.AdamW([p for k in group for p in blocks[k].parameters()], lr=0.0, weight_decay=0.05)
            for group in groups
        ]

    def step(self, batch: Batch) -> list[Tensor]:
        losses = []
        with self.autocast():
            known = self.paired.teacher_outputs(batch.images, self.wanted) if self.wanted else {}
        for group, aligned, optimizer in zip(self.groups, self.aligned, self.optimizers):
            entry = known[group[0] - 1] if group[0] else batch.images
            loss = self._loss(group, aligned, entry, known, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def _loss(
        self, group: list[int], aligned: list[int], x: Tensor, known: dict[int, Tensor], labels: Tensor
    ) -> Tensor:
        terms = []
        for k in group:
            with self.autocast():
                x = self.paired.student_blocks[k](x)
            own = x.float() if self.bf16 else x
            if k in aligned:
                target = known[k].to(own.dtype)
                terms.append(nn.functional.mse_loss(own, target) / target.square().mean())
            elif k == self.last and self.use_teacher_logits:
                terms.append(kd_loss(own, known[k].to(own.dtype), labels, KL_WEIGHT))
            elif k == self.last:
                terms.append(nn.functional.cross_entropy(own, labels))
        return torch.stack(terms).sum()
