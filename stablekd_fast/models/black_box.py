"""A teacher of which nothing is known but what it answers: a service, or a network that its owner keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.errors import ConfigError, ModelError

LEAST = 1e-6
"""Smaller probabilities are taken for this one, so that all have a logarithm."""
_OFF = 1e-2
"""By so much the probabilities of an image may miss a sum of 1: answers are rounded."""


class BlackBox(nn.Module):
    """Logits of a callable's answers: the logarithms of probabilities. It has no parameters and gives no gradients."""

    def __init__(self, answer: Callable[[Tensor], Any], classes: int) -> None:
        super().__init__()
        self.classes = classes
        self._answer: Callable[[Tensor], Any] = lambda images: answer(images)  # no attribute of it is ever asked for

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` to logits float32 `[N, classes]`. Raises ModelError for answers of another kind."""
        with torch.autocast(images.device.type, enabled=False):
            answers = torch.as_tensor(self._answer(images.float()), device=images.device)
        if answers.dim() == 1 and not answers.is_floating_point():
            return self._of_labels(answers.long(), len(images))
        if answers.shape != (len(images), self.classes) or not answers.is_floating_point():
            raise ModelError(
                f"The black box answered {list(answers.shape)} {str(answers.dtype).removeprefix('torch.')} to "
                f"{len(images)} images. Have it answer probabilities [{len(images)}, {self.classes}], or whole numbers "
                f"[{len(images)}], one class for each image."
            )
        answers = answers.float()
        if not bool(((answers >= 0) & (answers <= 1)).all()) or not bool(((answers.sum(1) - 1).abs() < _OFF).all()):
            raise ModelError(
                f"The black box answered numbers from {answers.min():g} to {answers.max():g}, which are no "
                "probabilities: those of an image sum to 1. Have it take the softmax of its logits."
            )
        return answers.clamp(min=LEAST).log()

    def _of_labels(self, labels: Tensor, count: int) -> Tensor:
        if len(labels) != count or not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise ModelError(
                f"The black box answered {len(labels)} labels to {count} images, from {labels.min()} to "
                f"{labels.max()}. Have it answer one label for each image, from 0 to {self.classes - 1}."
            )
        return F.one_hot(labels, self.classes).float().clamp(min=LEAST).log()


def black_box(answer: Callable[[Tensor], Any], *, classes: int) -> BlackBox:
    """Make a teacher of a callable, for `Distiller(config, teacher=...)`.

    `answer` is given images float32 `[N, 3, H, W]`, normalised as the student's, or by `teacher_mean` and
    `teacher_std`, and answers probabilities `[N, classes]` or labels, whole numbers `[N]`, as a tensor or an array. It
    is called and nothing else: it needs no gradients, parameters or features. Raises ConfigError for what cannot be
    called, and for fewer than two classes.
    """
    if not callable(answer):
        raise ConfigError(f"A {type(answer).__name__} was given as a black box; it must be called with images.")
    if classes < 2:
        raise ConfigError(f"classes={classes} was given; there must be at least 2.")
    return BlackBox(answer, classes)
