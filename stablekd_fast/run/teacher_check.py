"""Whether the teacher of a run knows its images: its accuracy on held-out ones, once, before training."""

from __future__ import annotations

import itertools
import math
import warnings

from stablekd_fast.engine.evaluate import Metrics, evaluate
from stablekd_fast.models.weights import card_of
from stablekd_fast.run.materials import Materials

TEACHER_IMAGES = 2000
"""On about so many images the teacher's accuracy is measured."""

FAR_BELOW = 0.1
"""A teacher that is so much less accurate than its file says is not given the images that it knows."""


def look_at_teacher(materials: Materials, *, given: bool) -> dict | None:
    """Measure the teacher's accuracy and warn of one that knows little; what is logged. None where there are no
    held-out images, no teacher, or no classifier. `given`: the teacher came as a module, not by its name."""
    config, source, paired = materials.config, materials.images.validation, materials.paired
    if source is None or not config.has_teacher or config.head != "classifier":
        return None
    last = len(paired) - 1
    batches = itertools.islice(source.batches(), math.ceil(TEACHER_IMAGES / source.batch_size))

    def measure() -> Metrics:
        return evaluate(
            lambda images: paired.teacher_outputs(images, [last])[last],
            batches,
            lambda tensor: tensor.to(materials.device),
        )

    metrics = materials.ranks.from_first(measure)
    said = None if given or metrics.ranking is not None else card_of(config.teacher_weights).get("accuracy")
    what = f"The teacher tells {metrics.accuracy:.1%} of {metrics.images} held-out images right"
    chance = 1 / len(materials.images.dataset.classes)
    advice = "Look at its weights, at the order of classes, and at --teacher_mean and --teacher_std."
    if metrics.accuracy < 2 * chance and metrics.images * chance >= 1:
        warnings.warn(f"{what}; guessing would give {chance:.1%}. {advice}", stacklevel=2)
    elif said is not None and metrics.accuracy < said - FAR_BELOW:
        warnings.warn(f"{what}; its file says {said:.1%}. {advice}", stacklevel=2)
    return {"accuracy": metrics.accuracy, "images": metrics.images}
