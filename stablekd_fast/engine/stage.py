"""The ranks of a stage: what they tell each other of their groups, and what each of them did."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stablekd_fast.distributed import Layout, Ranks
from stablekd_fast.engine.step import GroupStep


class Together:
    """The groups of a stage, divided over ranks by a layout. `steps` are those of all groups; `own` are trained
    here."""

    def __init__(self, ranks: Ranks, layout: Layout, steps: list[GroupStep]) -> None:
        self.ranks, self.layout, self.steps = ranks, layout, steps
        self.own = [steps[group] for group in layout.groups_of(ranks.rank)]
        self.idle = 0.0
        """Seconds of training in which this rank waited for others."""
        self._bytes_before = (ranks.gradient_bytes, ranks.other_bytes)

    @contextmanager
    def training(self) -> Iterator[None]:
        """What is waited for within counts as idle."""
        before = self.ranks.waited
        yield
        self.idle += self.ranks.waited - before

    def stores(self, cut_count: int) -> set[int]:
        """The teacher's outputs that this rank stores: one that two places read is stored by the first of them."""
        place = self.layout.block_of(self.ranks.rank)
        before = [step.group for step, at in zip(self.steps, self.layout.places) if at < place]
        objectives = self.own[0].objectives
        read = objectives.teacher_outputs([step.group for step in self.own], cut_count)
        return read - set().union(*(objectives.teacher_outputs([group], cut_count) for group in before))

    def gather(self) -> None:
        """After it every rank holds every group as its owner does, and the first one's random state."""
        if self.ranks.size == 1:
            return
        random = torch.get_rng_state()
        for number, step in enumerate(self.steps):
            self.ranks.broadcast(step.state(), self.layout.owner(number))
        self.ranks.broadcast([random], 0)
        torch.set_rng_state(random)

    def share_losses(self) -> float:
        """After it every rank knows the losses of all groups. Gives the seconds that it took, waiting included."""
        if self.ranks.size == 1:
            return 0.0
        start = time.perf_counter()
        with self.training():
            for number, step in enumerate(self.steps):
                self.ranks.broadcast([step.losses, step.first_bad], self.layout.owner(number))
        self.ranks.say_where()
        return time.perf_counter() - start

    def report(self, steps: int, seconds: float) -> list[dict]:
        """For each rank what it did in `steps` steps and so many seconds, as predicted and as measured."""
        layout, ranks, before = self.layout, self.ranks, self._bytes_before
        return ranks.all_gather(
            {
                "rank": ranks.rank,
                "groups": [step.name for step in self.own],
                "predicted_ms": 1e3 * layout.seconds[layout.block_of(ranks.rank)] if layout.seconds else None,
                "measured_ms": 1e3 * (seconds - self.idle) / steps,
                "idle_share": self.idle / seconds if seconds else 0.0,
                "gradient_bytes": (ranks.gradient_bytes - before[0]) / steps,
                "other_bytes": (ranks.other_bytes - before[1]) / steps,
            }
        )
