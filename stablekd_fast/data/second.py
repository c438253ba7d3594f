"""A second view of images in the same step, for losses that compare two views."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import replace

import torch

from stablekd_fast.data.batch import Batch
from stablekd_fast.data.dali_stream import StreamSource
from stablekd_fast.data.source import TrainSource
from stablekd_fast.errors import ConfigError

SECOND_VIEWS = 1 << 20
"""Second views are numbered from here, so that none is a view that training shows first."""


def with_second(
    batches: Iterable[Batch], source: TrainSource | StreamSource, which: str, start_step: int, dtype: torch.dtype
) -> Generator[Batch]:
    """Return the batches of the steps from `start_step` on, each with a second view as `second`.

    `which` is `same`: of the same images; or `last`: of those of the step before, in its order; the first step of a
    run gets its own. Second views have names of their own, from the seed and the step. Raises ConfigError for a source
    whose views have no names.
    """
    if not isinstance(source, TrainSource):
        raise ConfigError(
            "source=dali-stream was given, whose views have no names; a second view needs another source."
        )
    other = copy.copy(source)
    other.prepare_second()
    back = 1 if which == "last" else 0
    steps = (max(step - back, 0) for step in itertools.count(start_step))
    jobs = ((other.positions(step), SECOND_VIEWS + step // source.steps_per_epoch) for step in steps)
    with closing(other.made(jobs, dtype)) as seconds:
        for batch in batches:
            yield replace(batch, second=next(seconds).pixels)
