"""The teacher on the images that are held out, before the first step: one that knows little of them is told."""

from __future__ import annotations

import itertools
import math
import warnings

from stablekd_fast.engine.evaluate import Metrics, evaluate
from stablekd_fast.models.weights import card_of
from stablekd_fast.report import NoRecorder, Recorder
from stablekd_fast.run.materials import Given, Materials

TEACHER_IMAGES = 2000
"""On about so many images the teacher's accuracy is measured."""

FAR_BELOW = 0.1
"""A teacher that is so much less accurate than its file says is not given the images that it knows."""


def look_at_teacher(materials: Materials, given: Given, recorder: Recorder | NoRecorder) -> None:
    """Measure the accuracy of a teacher with a classifier once, if there are held-out images with labels, and warn of
    one that knows little."""
    config, source = materials.config, materials.images.validation
    if source is None or not config.has_teacher or config.head != "classifier" or source.truth != "labels":
        return
    last, paired = len(materials.paired) - 1, materials.paired
    batches = itertools.islice(source.batches(), math.ceil(TEACHER_IMAGES / source.batch_size))

    def measure() -> Metrics:
        return evaluate(
            lambda images: paired.teacher_outputs(images, [last])[last], batches,
            lambda tensor: tensor.to(materials.device),
        )  # fmt: skip

    metrics = materials.ranks.from_first(measure)
    recorder.emit("teacher", step=0, accuracy=metrics.accuracy, images=metrics.images, split="held-out")
    unlike = given.teacher is not None or metrics.ranking is not None
    said = None if unlike else card_of(config.teacher_weights).get("accuracy")
    what = f"The teacher tells {metrics.accuracy:.1%} of {metrics.images} held-out images right"
    chance = 1 / len(materials.images.dataset.classes)
    advice = "Look at its weights, at the order of classes, and at --teacher_mean and --teacher_std."
    if metrics.accuracy < 2 * chance and metrics.images * chance >= 1:
        warnings.warn(f"{what}; guessing would give {chance:.1%}. {advice}", stacklevel=1)
    elif said is not None and metrics.accuracy < said - FAR_BELOW:
        warnings.warn(f"{what}; its file says {said:.1%}. {advice}", stacklevel=1)
