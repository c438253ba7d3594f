"""One of two processes that train a `Blockwise` in DistributedDataParallel; `test_blockwise_ranks.py` starts them.

Its arguments are a file for what the first process finds, as JSON, and a folder for rows.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from stablekd_fast import Blockwise
from stablekd_fast.data import Batch
from stablekd_fast.distributed import Averaging, join
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.integrations.views import SampleViews
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay

STEPS, SIZE, RATE = 8, 16, 0.02


class Net(nn.Module):
    """Three stages of a convolution each, and a classifier; with batch norms or without."""

    def __init__(self, widths, norms, seed):
        super().__init__()
        torch.manual_seed(seed)
        inside = 3
        for number, width in enumerate(widths, start=1):
            norm = nn.BatchNorm2d(width) if norms else nn.Identity()
            convolution = nn.Conv2d(inside, width, 3, 1 if number == 1 else 2, 1)
            self.add_module(f"layer{number}", nn.Sequential(convolution, norm, nn.ReLU()))
            inside = width
        self.fc = nn.Linear(inside, 10)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def batch(number):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(SIZE, 3, 8, 8, generator=generator, dtype=torch.float64)
    images *= torch.rand(SIZE, 1, 1, 1, generator=generator, dtype=torch.float64)  # halves have other powers
    return images, torch.randint(10, (SIZE,), generator=generator)


def part(rank):
    return slice(rank * SIZE // 2, (rank + 1) * SIZE // 2)


def own_loop(skd, rank):
    """The losses of the whole batches by a loop of one's own, which merges halfway."""
    module = DistributedDataParallel(skd)
    optimizer, losses = torch.optim.SGD(skd.parameters(), RATE), []
    for step in range(STEPS):
        module.module.begin(step * 2 // STEPS)
        images, labels = batch(step)
        out = module(images[part(rank)], labels[part(rank)])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        loss = out.loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / 2)
    return losses


def engine_loop(paired, rank, averaging):
    """The same by the engine: on each rank's part where it averages, else on whole batches."""
    aims, losses = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all"), []
    for stage, groups in enumerate([[[0], [1], [2], [3]], [[0, 1, 2, 3]]]):
        inputs, rates = StageInputs(), Rates.constant(RATE, 0.0)
        settings, wanted = Optimizer("sgd", weight_decay=0.0), aims.teacher_outputs(groups, len(paired.cuts))
        steps = [
            GroupStep(paired, group, aims, settings, inputs, rates=rates, history=STEPS // 2, averaging=averaging)
            for group in groups
        ]
        paired.student.train()
        for number in range(stage * STEPS // 2, (stage + 1) * STEPS // 2):
            images, labels = (x[part(rank)] if averaging else x for x in batch(number))
            load_batch(inputs, Relay(paired), wanted, Batch(torch.arange(len(labels)), 0, images, labels))
            for step in steps:
                step.run()
        losses += torch.stack([step.losses for step in steps]).sum(0).tolist()
    return losses


def compare(norms, rank, averaging):
    """The largest relative difference to the engine of losses and of weights, and how far the weights went."""
    teacher, student = Net((12, 16, 24), True, 0).double(), Net((8, 16, 16), norms, 1).double()
    with torch.no_grad():
        for number in range(30):
            teacher.train()(batch(number)[0])
    twin, before = copy.deepcopy((teacher, student)), copy.deepcopy(student)
    skd = Blockwise(teacher, student, batch(0)[0], 2, share=0.5)
    other = Blockwise(*twin, batch(0)[0], 2, share=0.5)
    other.paired.teacher.eval()
    losses, wanted = own_loop(skd, rank), engine_loop(other.paired, rank, averaging if norms else None)
    weights, reference, first = (nn.utils.parameters_to_vector(n.parameters()) for n in (student, twin[1], before))
    moved = (reference - first).norm()
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
    return [difference, ((weights - reference).norm() / moved).item(), (moved / first.norm()).item()]


def with_rows(rank, folder):
    """Losses of three epochs that show one view, live and from rows, and for which part of the batches the
    teacher ran."""
    found = []
    for rows in (None, folder):
        views = SampleViews("digits", views=1, batch_size=32)
        teacher, student, ran = Net((12, 16, 24), True, 0).eval(), Net((8, 16, 16), True, 1), []
        skd = Blockwise(teacher, student, views, 3, rows=rows)
        teacher.layer1[0].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        module, losses = DistributedDataParallel(skd), []
        optimizer, sampler = torch.optim.SGD(skd.parameters(), RATE), DistributedSampler(views, seed=1)
        for epoch in range(3):
            skd.begin(epoch)
            sampler.set_epoch(epoch)
            for images, labels, keys in DataLoader(views, 32, sampler=sampler):
                out = module(images, labels, keys)
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
                losses.append(out.loss.item())
            dist.barrier()
        skd.close()
        found.append([losses, len(ran) / len(losses)])
    return found


def main(out, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    rank = dist.get_rank()
    averaging = Averaging(join(torch.device("cpu"), 60), dist.group.WORLD, 2)
    found = {"plain": compare(False, rank, averaging), "norms": compare(True, rank, averaging)}
    torch.set_default_dtype(torch.float32)
    found["rows"] = with_rows(rank, folder)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
