"""Accuracy of the composed student, and the measures taken around a merge. None of it changes training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast import models
from stablekd_fast.assemble import bn_batches, eval_source, pick_device, split_training_images, train_source
from stablekd_fast.checkpoint import load_tensors
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Batch, open_dataset
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.memory import placed


@dataclass(frozen=True)
class Metrics:
    accuracy: float
    """Top-1, 0 to 1."""
    top5: float
    loss: float
    """Mean cross entropy."""
    images: int


@torch.no_grad()
def with_fresh_batch_norm(
    model: nn.Module, batches: Iterable[Batch], to_device: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A copy of `model` in eval mode whose batch-norm statistics are averages over `batches`; without any, its own.

    Blocks trained on the teacher's activations hold statistics of those; composed, the student sees its own.
    """
    model = copy.deepcopy(model).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms, batches = [norm for norm in norms if norm.track_running_stats], iter(batches)
    first = next(batches, None)
    if not norms or first is None:
        return model
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for batch in itertools.chain([first], batches):
        model(to_device(batch.images))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()
    return model


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    to_device: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> Metrics:
    """Top-1, top-5 and cross entropy of `model` (taken as it is; put it in eval mode first).

    `total` adds up sums over processes, each of which has other batches.
    """
    correct = correct5 = count = 0
    loss = 0.0
    for batch in batches:
        images, labels = to_device(batch.images), to_device(batch.labels)
        logits = model(images).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        correct += ranked[:, 0].sum().item()
        correct5 += ranked.any(1).sum().item()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    correct, correct5, loss, count = total(torch.tensor([correct, correct5, loss, count], dtype=torch.float64)).tolist()
    return Metrics(correct / count, correct5 / count, loss / count, int(count))


_OF_THE_IMAGES = (
    "subset", "subset_seed", "validation", "batch_size", "image_size", "seed", "view_seed", "views", "bn_images",
    "jitter", "mix", "mix_alpha", "scaled_decode",
)  # fmt: skip
"""Settings of a run that decide which training images its batch-norm statistics are taken over, and how they look. Not
the source: another machine may lack it."""


def evaluate_file(
    path: Path, *, model: str | None = None, data: str | None = None, split: str = "test", device: str = "auto"
) -> Metrics:
    """Top-1, top-5 and cross entropy of a student, a checkpoint, or a weights file.

    Model and data set are those of the run that wrote the file, unless given; files from elsewhere need both. The
    batch-norm statistics of a checkpoint are re-estimated, as at the end of a run.
    Raises ConfigError, ModelError, DataError or CheckpointError if something is missing or does not fit.
    """
    tensors, metadata = load_tensors(path) if path.suffix == ".safetensors" else ({}, {})
    run = metadata.get("identity")
    model = model or metadata.get("student") or (run and run["student"])
    data = data or metadata.get("data") or (run and run["data"])
    if not model or not data:
        raise ConfigError(f"{path} does not say which model and data set it belongs to; pass --model and --data.")
    target = pick_device(device)
    config = DistillConfig(data=data, student=model)
    if run:
        config = DistillConfig(data=data, student=model, **{name: run[name] for name in _OF_THE_IMAGES if name in run})
    dataset = open_dataset(data, image_size=config.image_size)
    images = eval_source(dataset, getattr(dataset, split), config)
    size = next(iter(images.batches())).images.shape[-1]
    network = models.build(model, len(dataset.classes), size)
    if run:
        student = {name.removeprefix("student/"): t for name, t in tensors.items() if name.startswith("student/")}
        network.load_state_dict(student)
    else:
        models.load_weights(network, path)
    network = placed(network, target).eval()
    if run:
        source = train_source(dataset, split_training_images(dataset, config)[0], config, target)
        batches = source.batches(0, bn_batches(config, source))
        network = with_fresh_batch_norm(network, batches, lambda tensor: tensor.to(target))
    return evaluate(network, images.batches(), lambda tensor: tensor.to(target))
