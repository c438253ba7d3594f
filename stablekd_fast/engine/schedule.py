"""Decomposition and recomposition as data: which blocks train together, for how long, at which learning rate.

A stage is a list of groups of neighbouring blocks. Within a stage every group is trained alone, fed with the
teacher's activation before it; the groups of a later stage are unions of the groups of an earlier one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Literal

from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import method_named

RECIPES = ("default", "progressive", "paper", "paper-end-to-end")
DECOMPOSED_SHARE, MERGED_LR = 0.75, 0.1
"""The default recipe: the fraction of the steps in which every block trains alone, and the peak learning rate of the
merged student relative to that of the blocks. Measured in docs/results/recipe.md."""


@dataclass
class Optimizer:
    """One stage's optimizer. The learning rate starts and ends each stage near zero, unless `cycle` is `constant`."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    lr: float = 0.02
    """The peak of the learning rate."""
    cycle: Literal["cosine", "triangular", "constant"] = "cosine"
    """How the learning rate moves within a stage: `cosine` rises linearly for `warmup` and falls as a half cosine;
    `triangular` rises linearly to the middle and falls linearly (one cycle of torch's CyclicLR); `constant` does
    neither."""
    warmup: float = 0.15
    """The fraction of the stage in which `cosine` rises."""
    momentum: float = 0.9
    """The momentum of SGD."""
    momentum_low: float | None = None
    """Where the momentum falls to while the learning rate rises; None keeps it at `momentum`."""
    weight_decay: float = 0.05
    """Decay of the weights, decoupled from the gradient for AdamW, added to it for SGD."""
    nesterov: bool = False
    """Whether SGD takes the momentum of Nesterov."""
    decay: Literal["all", "weights"] = "all"
    """Which parameters decay: all of them, or neither biases nor the vectors of norms."""
    clip: float | None = None
    """The largest norm that a group's gradient may have; a longer one is scaled down to it."""
    implementation: Literal["auto", "fused", "foreach", "apex"] = "auto"
    """AdamW has `fused`, `foreach` and `apex` (NVIDIA's, where it is installed); SGD has `foreach`, which `auto` leaves
    on GPUs, where the momentum is the same in all steps, for torch's fused kernel."""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("lr", self.lr, 0.0, math.inf),
            ("warmup", self.warmup, 0.0, 1.0),
            ("momentum", self.momentum, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
        ):
            if not low <= value <= high:
                raise ConfigError(f"optimizer.{name}={value} was given; it must lie between {low} and {high}.")
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"optimizer.clip={self.clip} was given; it must be greater than 0.")

    def lr_at(self, progress: float) -> float:
        """Learning rate at `progress` (0 to 1) through the stage."""
        return self.lr * self._height(progress)

    def momentum_at(self, progress: float) -> float:
        if self.momentum_low is None:
            return self.momentum
        return self.momentum - (self.momentum - self.momentum_low) * self._height(progress)

    def _height(self, progress: float) -> float:
        if self.cycle == "constant":
            return 1.0
        if self.cycle == "triangular":
            return max(1.0 - abs(2.0 * progress - 1.0), 1e-3)
        if progress < self.warmup:
            return max(progress / self.warmup, 0.01)
        return max(0.5 * (1.0 + math.cos(math.pi * (progress - self.warmup) / (1.0 - self.warmup))), 0.01)


@dataclass
class Stage:
    """Groups of neighbouring blocks that train together, e.g. `[[0, 1], [2, 3]]`.

    Exactly one of `epochs`, `steps` and `share` says how long.
    """

    groups: list[list[int]]
    """The numbers of the blocks, from 0, that train together: all blocks once each, in order."""
    share: float | None = None
    """The stage's part of the steps that stages of fixed length leave, in proportion to the other stages' shares."""
    epochs: float | None = None
    """The stage's length in epochs."""
    steps: int | None = None
    """The stage's length in steps."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The stage's optimizer."""
    optimizer_state: Literal["carry", "reset"] = "reset"
    """What a merged group does with the moments of the groups it was merged from."""

    def __post_init__(self) -> None:
        given = {
            k: v for k, v in (("share", self.share), ("epochs", self.epochs), ("steps", self.steps)) if v is not None
        }
        if len(given) != 1 or next(iter(given.values())) <= 0:
            raise ConfigError(
                f"Stage {self.name} has the length {given or 'nothing'}; give exactly one of share, epochs, steps, "
                "greater than 0."
            )

    @property
    def name(self) -> str:
        return "|".join(group_name(group) for group in self.groups)


def group_name(group: list[int]) -> str:
    """`[0, 1]` is called `1+2`: people count blocks from one."""
    return "+".join(str(block + 1) for block in group)


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its place in the run: it trains steps `first` up to, not including, `last`."""

    stage: Stage
    first: int
    last: int

    def progress(self, step: int) -> float:
        return (step - self.first) / (self.last - self.first)


def plan_stages(stages: list[Stage], blocks: int, total_steps: int, steps_per_epoch: int) -> list[PlannedStage]:
    """Give every stage its steps, so that together they fill `total_steps`.

    Raises ConfigError if groups are not neighbouring blocks in order, if a later stage splits a group, or if the
    lengths do not fit.
    """
    previous: list[list[int]] = []
    for stage in stages:
        if [block for group in stage.groups for block in group] != list(range(blocks)):
            raise ConfigError(
                f"Stage {stage.name} must hold the blocks 1 to {blocks} once each, in order; groups are neighbours."
            )
        borders = {group[0] for group in stage.groups}
        if previous and not borders <= {group[0] for group in previous}:
            raise ConfigError(
                f"Stage {stage.name} splits a group of the stage before it; stages may only merge groups."
            )
        previous = stage.groups
    fixed = [
        stage.steps if stage.steps is not None else round(stage.epochs * steps_per_epoch) if stage.epochs else 0
        for stage in stages
    ]
    shares = [stage.share or 0.0 for stage in stages]
    left = total_steps - sum(fixed)
    if left < 0 or (left > 0 and not any(shares)):
        raise ConfigError(
            f"The stages take {sum(fixed)} steps, but the run has {total_steps} "
            f"({total_steps / steps_per_epoch:g} epochs); change --epochs or the stages' lengths."
        )
    planned, position, placed = [], 0, 0.0
    for stage, own, share in zip(stages, fixed, shares):
        if share:
            before = round(left * placed / sum(shares))
            placed += share
            own = round(left * placed / sum(shares)) - before
        if own < 1:
            raise ConfigError(f"Stage {stage.name} gets no step of the {total_steps} in this run; give it more epochs.")
        planned.append(PlannedStage(stage, position, position + own))
        position += own
    return planned


def extended(planned: list[PlannedStage], total_steps: int) -> list[PlannedStage]:
    """The stages of a run, and behind them one more like the last, which trains up to `total_steps`.

    It takes over the optimizer's moments, and goes through a cycle of its own.
    """
    last = planned[-1]
    stage = dataclasses.replace(
        last.stage, share=None, epochs=None, steps=total_steps - last.last, optimizer_state="carry"
    )
    return [*planned, PlannedStage(stage, last.last, total_steps)]


def merge_neighbours(blocks: int) -> list[list[list[int]]]:
    """Groups of each stage when neighbours merge two by two until one group is left: 4, 2, 1 for four blocks."""
    groups = [[block] for block in range(blocks)]
    stages = [groups]
    while len(groups) > 1:
        pairs = (groups[i : i + 2] for i in range(0, len(groups), 2))
        groups = [[block for group in pair for block in group] for pair in pairs]
        stages.append(groups)
    return stages


def method_stages(method: str, blocks: int, recipe: str = "default", optimizer: Optimizer | None = None) -> list[Stage]:
    """The stages of a method for a network of `blocks` blocks.

    `stablekd` decomposes and merges; `blocks` never merges; all others train end to end from the start. Recipes of
    `stablekd`:

    - `default`: every block alone for three quarters of the steps, then all at once end to end, gently.
    - `progressive`: neighbours merge two by two, in stages of one length whose peak learning rate halves.
    - `paper`: the schedule of the StableKD authors' earlier draft (Divide and Distill), three phases like those, of SGD
      with one triangular cycle each, never merging the classifier in.
    - `paper-end-to-end`: a fourth phase that does.

    Raises ConfigError for an unknown method or recipe.
    """
    how = method_named(method).stages
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} does not exist; choose one of {', '.join(RECIPES)}.")
    if how != "decomposed":
        groups = [[block] for block in range(blocks)] if how == "apart" else [list(range(blocks))]
        return [Stage(groups, share=1.0, optimizer=optimizer or Optimizer())]
    if recipe == "default":
        blocks_lr, apart = optimizer or Optimizer(), merge_neighbours(blocks)[0]
        merged_lr = replace(blocks_lr, lr=MERGED_LR * blocks_lr.lr)
        stages = [Stage(apart, share=DECOMPOSED_SHARE, optimizer=blocks_lr)]
        if blocks == 1:
            return stages
        return [*stages, Stage([list(range(blocks))], share=1 - DECOMPOSED_SHARE, optimizer=merged_lr)]
    groupings = merge_neighbours(blocks)
    if recipe != "progressive":
        body, head = merge_neighbours(blocks - 1), [[blocks - 1]]
        groupings = [body[0] + head, body[min(1, len(body) - 1)] + head, body[-1] + head]
        if recipe == "paper-end-to-end":
            groupings.append([list(range(blocks))])
    first = optimizer or (Optimizer() if recipe == "progressive" else _PAPER)
    halved = [replace(first, lr=first.lr / 2**i) for i in range(len(groupings))]
    return [Stage(groups, share=1.0, optimizer=own) for groups, own in zip(groupings, halved)]


def with_idle_end(stages: list[Stage]) -> list[Stage]:
    """Add to the last group of each stage one more block, behind those that it has: one with nothing to train."""
    last = stages[0].groups[-1][-1] + 1
    return [replace(stage, groups=[*stage.groups[:-1], [*stage.groups[-1], last]]) for stage in stages]


_PAPER = Optimizer("sgd", lr=0.5, cycle="triangular", momentum=0.9, momentum_low=0.8, weight_decay=5e-4)
