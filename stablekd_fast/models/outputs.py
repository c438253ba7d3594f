"""Which tensor of what a network returns holds its logits, or the embedding of a network without a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

NAMES = (
    "logits", "out", "output", "prediction", "embedding", "image_embeds", "pooler_output", "x_norm_clstoken",
)  # fmt: skip
"""Under these names, in this order, networks that return several values keep their logits, or the embedding where they
have no classifier, as DINOv2 and the networks of Hugging Face do."""


def logits_of(output: Any) -> Any:
    """Return the logits of what a network returned: of a tuple or list the first value, of a mapping or dataclass the
    value under the first of `NAMES` that it has, else its first value; everything else is returned as it is."""
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        held = {name: value for name, value in output.items() if value is not None}
        return next((held[name] for name in NAMES if name in held), next(iter(held.values()), None))
    if isinstance(output, (tuple, list)) and output:
        return logits_of(output[0])
    return output


class LogitsOf(nn.Module):
    """A network that returns its logits alone, whatever else it returns; it is trained and put into modes with it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` to logits `[N, classes]`."""
        return logits_of(self.network(images))
