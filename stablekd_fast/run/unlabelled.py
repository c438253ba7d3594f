"""Runs on images without labels: what they cannot learn from, and what their student is held against."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.config import DistillConfig, losses_of, objectives_of, synthesis_of
from stablekd_fast.data import EvalSource
from stablekd_fast.errors import ConfigError

_CE = "ce_weight"
NEED_LABELS = {
    "logits": {
        "dkd": "compares the class of the label with the others",
        "bpr": "compares items that are a user's with others",
    },
    "auxiliary": {
        "cckd": "weighs images by what the teacher gives the label",
        "kdiga": "compares gradients of the cross entropy with the labels",
        "dlb": "adds the cross entropy with the labels",
        "unkd": "leaves out the items that are a user's",
    },
}
"""Losses that are nothing without labels, by place, and why; others have at most a `ce_weight`."""


def without_labels(config: DistillConfig) -> DistillConfig:
    """Return the settings of a run whose training images have no labels: the weight of the cross entropy is 0 where
    nobody gave another.

    Raises ConfigError for a loss that needs labels, with what to use instead.
    """
    if synthesis_of(config) is not None:  # images that are made have labels
        return config
    losses = losses_of(config)
    if not config.has_teacher:
        raise ConfigError(
            f"method={config.method} learns from labels alone, and the training images have none; use a method with a "
            "teacher, for instance --method kd, or images with labels (train/CLASS/* and test/CLASS/*)."
        )
    for place, needing in NEED_LABELS.items():
        reason = needing.get(losses[place])
        if reason is not None:
            raise ConfigError(
                f"{losses[place]} {reason}, and the training images have no labels; use --method kd or another loss "
                "with --logits-options.ce-weight 0."
            )
    head = objectives_of(config).logits.config
    weight = getattr(head, _CE, 0.0)
    if not weight:
        return config
    if _CE in config.logits_options:
        raise ConfigError(
            f"logits_options.{_CE}={weight} was given, but the training images have no labels; leave it out, or give "
            "--logits-options.ce-weight 0."
        )
    if getattr(head, "kl_weight", None) == 0:
        raise ConfigError(
            f"The head of method={config.method} learns from labels alone, and the training images have none; give "
            "--logits-options.kl-weight 1 and --logits-options.ce-weight 0."
        )
    warnings.warn(
        "The training images have no labels: the cross entropy with them is left out, as by "
        "--logits-options.ce-weight 0.",
        stacklevel=1,
    )
    return dataclasses.replace(config, logits_options={**config.logits_options, _CE: 0.0})


def judged(source: EvalSource, paired: PairedBlocks) -> EvalSource:
    """Return a source as it is where its images have labels; else the same images with the teacher's first class as
    each one's label, so that what is measured is agreement with the teacher."""
    if source.split.labelled:
        return source
    last = len(paired) - 1

    def first_classes(images: Tensor) -> Tensor:
        with torch.no_grad():
            return paired.teacher_outputs(images, [last])[last].float().argmax(1)

    return source.labelled_by(first_classes)
