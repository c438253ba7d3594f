"""Measures what `kdiga` keeps of a robust teacher: accuracy under attack beside that of a student of plain kd.

    python -m stablekd_fast.bench.campaigns.robustness --data CIFAR --teacher-weights FILE --out DIR

First the teacher is made robust: it trains on for some epochs on images that are attacked as it learns (Madry et al.,
arXiv 1706.06083). Then each method distils it with several seeds into students that see no attacked image. All are
attacked in the end by one step along the gradient's sign (FGSM) and by ten steps projected into the same distance
(PGD), both in pixels of 0 to 1, from a random start. Interrupted, it goes on where it stopped; several processes side
by side share the work once the teacher is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast import models
from stablekd_fast.bench.campaigns.campaign import Campaign, add_task_arguments, recorded_settings, task_of
from stablekd_fast.bench.output import write_document
from stablekd_fast.cache import CacheSettings
from stablekd_fast.data import Dataset
from stablekd_fast.models.weights import load_weights
from stablekd_fast.report.terminal import print_rows
from stablekd_fast.run.builders import pick_device

METHODS: dict[str, dict] = {
    "kd": {"method": "kd", "logits_options": {"temperature": 1.0, "kl_weight": 0.5, "ce_weight": 0.5}},
    "kdiga": {"method": "kdiga"},
}
"""Both with the same divergence and the same weights: they differ in the input gradients alone."""

DISTANCES = (1 / 255, 2 / 255, 4 / 255)
PGD_STEPS = 10


class Attack:
    """Moves images within `distance` of where they were, so that a network's loss grows."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (dataset.mean, dataset.std)
        )

    def normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def moved(self, network: nn.Module, images: Tensor, labels: Tensor, distance: float, steps: int) -> Tensor:
        """Return images `[N, 3, H, W]` of 0 to 1, moved from a random start in `steps` steps."""
        size = 1.25 * distance if steps == 1 else 2.5 * distance / steps
        moved = (images + torch.empty_like(images).uniform_(-distance, distance)).clamp(0, 1)
        for _ in range(steps):
            moved.requires_grad_(True)
            loss = F.cross_entropy(network(self.normalised(moved)), labels)
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + size * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, images - distance), images + distance).clamp(0, 1)
        return moved.detach()


def batches_of(
    images: Tensor, labels: Tensor, order: Tensor, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give images uint8 `[N, H, W, 3]` as float32 `[n, 3, H, W]` of 0 to 1, with their labels."""
    for places in order.split(size):
        yield images[places].to(device).permute(0, 3, 1, 2).float() / 255, labels[places].to(device)


def make_robust(network: nn.Module, dataset: Dataset, epochs: int, count: int, device: torch.device) -> None:
    """Train on with images of the training split that are attacked in three steps."""
    attack, split = Attack(dataset, device), dataset.train
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9, weight_decay=5e-4, nesterov=True)
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:count]
    total = epochs * -(-len(chosen) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total)
    for epoch in range(epochs):
        order = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(epoch))]
        for images, labels in batches_of(split.images, split.labels, order, 128, device):
            images = images.flip(3) if torch.rand(()) < 0.5 else images
            network.eval()
            moved = attack.moved(network, images, labels, DISTANCES[-1], 3)
            network.train()
            loss = F.cross_entropy(network(attack.normalised(moved)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def robust_teacher(campaign: Campaign, out: Path, epochs: int, count: int, device: torch.device) -> Path:
    """Return the weights of the robust teacher, which are made where they are not there."""
    path = out / "robust-teacher.safetensors"
    if not path.exists():
        network = models.build(campaign.task.teacher, len(campaign.dataset.classes), 32)
        load_weights(network, campaign.task.teacher_weights)
        torch.manual_seed(0)
        make_robust(network.to(device), campaign.dataset, epochs, count, device)
        out.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in network.state_dict().items()}, path)
    return path


def under_attack(name: str, weights: Path, dataset: Dataset, count: int, device: torch.device) -> dict[str, float]:
    """Return the accuracy in percent on `count` images of the test split: as they are, and attacked."""
    network = models.build(name, len(dataset.classes), 32)
    load_weights(network, weights)
    network.to(device).eval()
    attack, found = Attack(dataset, device), dict[str, list[Tensor]]()
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))[:count]
    torch.manual_seed(0)
    for images, labels in batches_of(dataset.test.images, dataset.test.labels, order, 250, device):
        shown = {"clean": images}
        for distance in DISTANCES:
            for kind, steps in (("FGSM", 1), ("PGD", PGD_STEPS)):
                shown[f"{kind} {255 * distance:.0f}"] = attack.moved(network, images, labels, distance, steps)
        for kind, moved in shown.items():
            with torch.no_grad():
                right = network(attack.normalised(moved)).argmax(1) == labels
            found.setdefault(kind, []).append(right)
    return {kind: 100 * torch.cat(right).double().mean().item() for kind, right in found.items()}


def summary(rows: list[dict]) -> list[dict]:
    """Return for each attack the means of both methods, and what `kdiga` gains over `kd` by seed."""
    by = {(row["method"], row["seed"]): row for row in rows}
    seeds = sorted({seed for method, seed in by if ("kd", seed) in by and ("kdiga", seed) in by})
    kinds = [key for key in rows[0] if key not in ("method", "seed")] if seeds else []
    table = []
    for kind in kinds:
        kd, kdiga = ([by[method, seed][kind] for seed in seeds] for method in ("kd", "kdiga"))
        gains = [own - other for own, other in zip(kdiga, kd)]
        spread = statistics.stdev(gains) if len(gains) > 1 else None
        table.append({"images": kind, "kd": statistics.fmean(kd), "kdiga": statistics.fmean(kdiga),
                      "gain": statistics.fmean(gains), "spread of the gain": spread})  # fmt: skip
    return table


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robust-epochs", type=int, default=10, help="epochs in which the teacher is made robust")
    parser.add_argument("--attacked", type=int, default=2_000, help="images of the test split that are attacked")
    add_task_arguments(parser, subset=4_000, validation=200, epochs=12, batch_size=64)
    arguments = parser.parse_args(words)
    campaign, out, device = Campaign(task_of(arguments)), Path(arguments.out), pick_device("auto")
    weights = robust_teacher(campaign, out, arguments.robust_epochs, int(arguments.subset), device)
    dataset, task = campaign.dataset, campaign.task
    campaign = Campaign(dataclasses.replace(task, teacher_weights=str(weights)), dataset)
    attacked = partial(under_attack, dataset=dataset, count=arguments.attacked, device=device)
    rows = [{"method": "teacher", "seed": 0, **attacked(task.teacher, weights)}]
    for seed in range(arguments.seeds):
        for method, settings in METHODS.items():
            folder = out / f"{method}-{seed}"
            own = {"evaluate_every": 0, "cache": CacheSettings(plan="none"), **settings}
            if campaign.run(folder, own, seed):
                rows.append({"method": method, "seed": seed, **attacked(task.student, folder / "student.safetensors")})
    table = summary(rows)
    print_rows("accuracy in percent", rows)
    print_rows("what kdiga gains", table)
    write_document(out / "robustness.json", {"rows": rows, "gains": table}, recorded_settings(arguments))


if __name__ == "__main__":
    main()
