"""Evaluation of what a run has written: a student, a checkpoint, or a weights file."""

from __future__ import annotations

from pathlib import Path

from stablekd_fast import models
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import open_dataset
from stablekd_fast.data.augmentation import AugmentSettings, CropSettings, EvaluationSettings
from stablekd_fast.engine.checkpoint import AVERAGE, STUDENT, below, load_tensors
from stablekd_fast.engine.evaluate import Metrics, evaluate, with_fresh_batch_norm
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution.memory import placed
from stablekd_fast.models.weights import restore_state
from stablekd_fast.run.builders import bn_batches, eval_source, pick_device, split_training_images, train_source

_OF_THE_IMAGES = (
    "subset", "subset_seed", "validation", "batch_size", "image_size", "seed", "view_seed", "views", "bn_images",
    "jitter", "mix", "mix_alpha", "scaled_decode", "mean", "std", "flip", "interpolation",
)  # fmt: skip
"""Settings of a run that decide which training images its batch-norm statistics are taken over, and how they look. Not
the source: another machine may lack it."""


def evaluate_file(
    path: Path, *, model: str | None = None, data: str | None = None, split: str = "test", device: str = "auto"
) -> Metrics:
    """Top-1, top-5 and cross entropy of a student, a checkpoint, or a weights file.

    Model, data set, normalisation and size of images are those of the run that wrote the file, unless given; files from
    elsewhere need model and data. The batch-norm statistics of a checkpoint are re-estimated, as at the end of a run.
    Raises ConfigError, ModelError, DataError or CheckpointError if something is missing or does not fit.
    """
    tensors, metadata = load_tensors(path) if path.suffix == ".safetensors" else ({}, {})
    run = metadata.get("identity")
    model = model or metadata.get("student") or (run and run["student"])
    data = data or metadata.get("data") or (run and run["data"])
    if not model or not data:
        raise ConfigError(f"{path} does not say which model and data set it belongs to; pass --model and --data.")
    target = pick_device(device)
    config = DistillConfig(data=data, student=model, image_size=metadata.get("image_size"))
    if run:
        config = DistillConfig(data=data, student=model, **{name: run[name] for name in _OF_THE_IMAGES if name in run})
        config.crop, config.augment = CropSettings(**run.get("crop", {})), AugmentSettings(**run.get("augment", {}))
    config.evaluation = EvaluationSettings(**(run or metadata).get("evaluation", {}))
    config.interpolation = (run or metadata).get("interpolation", config.interpolation)
    dataset = open_dataset(data, image_size=config.image_size)
    if not getattr(dataset, split).labelled or not dataset.classes:
        raise ConfigError(
            f"The {split} images of {data} have no labels, which accuracy is held against; pass --data with a data set "
            "that has some."
        )
    said = run or metadata
    if "mean" in said and "std" in said:
        dataset.mean, dataset.std = tuple(said["mean"]), tuple(said["std"])
    images = eval_source(dataset, getattr(dataset, split), config, device=target)
    size = dataset.model_size(next(iter(images.batches())).pixels)
    network = models.build(model, len(dataset.classes), size, weights=False)
    if run:
        # What a run evaluates and exports is the average, where it keeps one.
        restore_state(network, below(tensors, STUDENT) | below(tensors, AVERAGE))
    else:
        models.load_weights(network, path)
    network = placed(network, target).eval()
    if run:
        source = train_source(dataset, split_training_images(dataset, config)[0], config, target)
        batches = source.batches(0, bn_batches(config, source))
        network = with_fresh_batch_norm(network, batches, lambda tensor: tensor.to(target))
    return evaluate(network, images.batches(), lambda tensor: tensor.to(target))
