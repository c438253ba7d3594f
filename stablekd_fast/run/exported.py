"""Evaluation of what a run has written: a student, a checkpoint, or a weights file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stablekd_fast.config import DistillConfig, exported_name
from stablekd_fast.data import Batch, Dataset, Split, open_dataset
from stablekd_fast.data.augmentation import AugmentSettings, CropSettings, EvaluationSettings
from stablekd_fast.engine.checkpoint import AVERAGE, STUDENT, below, load_tensors
from stablekd_fast.engine.evaluate import Metrics, evaluate, with_fresh_batch_norm
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.memory import placed
from stablekd_fast.models.headless import named_network, without_classifier
from stablekd_fast.models.weights import restore_state
from stablekd_fast.run.builders import bn_batches, eval_source, pick_device, split_training_images, train_source
from stablekd_fast.run.probes import features_of, probed

_OF_THE_IMAGES = (
    "subset", "subset_seed", "validation", "batch_size", "image_size", "seed", "view_seed", "views", "bn_images",
    "jitter", "mix", "mix_alpha", "scaled_decode", "mean", "std", "flip", "interpolation",
)  # fmt: skip
"""Settings of a run that decide which training images its batch-norm statistics are taken over, and how they look. Not
the source: another machine may lack it."""


@dataclass(frozen=True)
class _Opened:
    """A network from a file, in eval mode, and the images that it is to be evaluated on."""

    network: nn.Module
    head: str
    dataset: Dataset
    config: DistillConfig
    device: torch.device

    def batches(self, split: Split) -> Iterator[Batch]:
        """The images of a split, unchanged."""
        return eval_source(self.dataset, split, self.config, device=self.device).batches()

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


def evaluate_file(
    path: Path, *, model: str | None = None, data: str | None = None, split: str = "test", device: str = "auto"
) -> Metrics:
    """Top-1, top-5 and cross entropy of a student, a checkpoint, or a weights file.

    Model, data set, normalisation and size of images are those of the run that wrote the file, unless given; files from
    elsewhere need model and data. The batch-norm statistics of a checkpoint are re-estimated, as at the end of a run.
    Raises ConfigError, ModelError, DataError or CheckpointError if something is missing or does not fit.
    """
    found = _opened(path, model, data, split, device)
    if found.head != "classifier":
        raise ConfigError(
            f"{path} holds a backbone without a classifier, which has no accuracy of its own; pass --probe knn,linear "
            "to learn one from its features."
        )
    return evaluate(found.network, found.batches(getattr(found.dataset, split)), found.to_device)


def probe_file(
    path: Path,
    probes: Sequence[str],
    *,
    images: int | None = None,
    model: str | None = None,
    data: str | None = None,
    split: str = "test",
    device: str = "auto",
) -> list[dict]:
    """What probes reach that learn from the features of a frozen network: a student, a checkpoint or a weights file,
    whose classifier is taken off if it has one. A row for each probe (see `probed`).

    `images`: learn from so many of the training images, with the classes in the proportions of the whole; None takes
    all. Features are computed once, of images that are not augmented. All else, and what is raised, is that of
    `evaluate_file`.
    """
    found = _opened(path, model, data, split, device, headless=True)
    train = found.dataset.train if images is None else found.dataset.train.subset(images, 0)
    learnt, asked = (
        features_of(found.network, found.batches(part), found.to_device)
        for part in (train, getattr(found.dataset, split))
    )
    return probed(probes, learnt, asked)


def _opened(
    path: Path, model: str | None, data: str | None, split: str, device: str, headless: bool = False
) -> _Opened:
    """Open what `evaluate_file` says; `headless`: take a classifier off."""
    tensors, metadata = load_tensors(path) if path.suffix == ".safetensors" else ({}, {})
    run = metadata.get("identity")
    said = run or metadata
    model = model or metadata.get("student") or (run and exported_name(run["method"], run["student"], run["teacher"]))
    data = data or said.get("data")
    if not model or not data:
        raise ConfigError(f"{path} does not say which model and data set it belongs to; pass --model and --data.")
    target = pick_device(device)
    config = _config_of(metadata, model, data)
    dataset = open_dataset(data, image_size=config.image_size)
    if not getattr(dataset, split).labelled or not dataset.classes:
        raise ConfigError(
            f"The {split} images of {data} have no labels, which accuracy is held against; pass --data with a data set "
            "that has some."
        )
    if "mean" in said and "std" in said:
        dataset.mean, dataset.std = tuple(said["mean"]), tuple(said["std"])
    images = eval_source(dataset, dataset.test, config, device=target)
    size, classes = dataset.model_size(next(iter(images.batches())).pixels), len(dataset.classes)
    head = said.get("head", "classifier")
    if run:
        # What a run evaluates and exports is the average, where it keeps one.
        network = named_network(model, classes, size, head, fetches=False)
        restore_state(network, below(tensors, STUDENT) | below(tensors, AVERAGE))
    else:
        network = named_network(model, classes, size, "embedding" if headless else head, path)
    network = placed(network, target).eval()
    if run:
        source = train_source(dataset, split_training_images(dataset, config)[0], config, target)
        batches = source.batches(0, bn_batches(config, source))
        network = with_fresh_batch_norm(network, batches, lambda tensor: tensor.to(target))
        if headless and head == "classifier":
            without_classifier(network)
    return _Opened(network, head, dataset, config, target)


def _config_of(metadata: dict, model: str, data: str) -> DistillConfig:
    """The settings of the run that wrote a file, as far as they say how images look."""
    run = metadata.get("identity")
    config = DistillConfig(data=data, student=model, image_size=metadata.get("image_size"))
    if run:
        config = DistillConfig(data=data, student=model, **{name: run[name] for name in _OF_THE_IMAGES if name in run})
        config.crop, config.augment = CropSettings(**run.get("crop", {})), AugmentSettings(**run.get("augment", {}))
    config.evaluation = EvaluationSettings(**(run or metadata).get("evaluation", {}))
    config.interpolation = (run or metadata).get("interpolation", config.interpolation)
    return config
