"""The settings of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass

from stablekd_fast.errors import ConfigError

NOT_USED = {
    "method", "head", "recipe", "stages", "epochs", "ema", "cache", "capture", "evaluate_every", "checkpoint_every",
    "log_every", "resume", "extend", "out", "bn_images", "synthesis", "synthesis_options",
}  # fmt: skip
"""Settings of a distillation that a diagnosis has no use for."""

END_TO_END, DECOMPOSED = ARMS = ("end to end", "decomposed")


@dataclass
class Probing:
    """How long to train, and how often and on how much to look."""

    steps: int = 200
    """Steps of each training. The learning rate goes through its whole cycle in them."""
    seeds: int = 3
    """Trainings of each arm; what is between them makes the intervals."""
    probes: int = 10
    """Steps that are looked at, evenly spread."""
    probe_batches: int = 8
    """Batches on which gradients are compared; they are not trained on in the meantime."""

    def __post_init__(self) -> None:
        for name, least, why in (
            ("steps", 1, "a training has"),
            ("seeds", 2, "an interval over seeds needs"),
            ("probes", 2, "a change from probe to probe needs"),
            ("probe_batches", 2, "noise between batches needs"),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} was given; {why} at least {least}.")
        if self.probes > self.steps:
            raise ConfigError(f"probes={self.probes} was given, but there are {self.steps} steps; give fewer.")

    @property
    def at(self) -> list[int]:
        """The steps that are looked at: the middles of equal parts of the training."""
        return [(2 * i + 1) * self.steps // (2 * self.probes) for i in range(self.probes)]
