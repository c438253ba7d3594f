"""Decoding by torchvision (or Pillow) in threads, which let go of the interpreter meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, tee

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.crops import BATCHES_AHEAD, Crops, Job
from stablekd_fast.data.threads import ordered_map

_IMAGES_PER_TASK = 16
"""So many divide the cost of handing a task to a thread and of drawing its boxes."""


@dataclass
class _Task:
    """Neighbours in a batch, and where their crops go."""

    positions: list[int]
    view: int
    images: Tensor
    """The images of the whole batch, to be filled."""
    start: int


def _starts(count: int) -> range:
    """Return where the tasks of a batch begin. An empty batch has a task too, which brings its empty images."""
    return range(0, max(count, 1), _IMAGES_PER_TASK)


class ThreadDecoder:
    """Decodes in `workers` threads (0: in the caller's), `depth` batches ahead."""

    def __init__(
        self, crops: Crops, *, batch_size: int, workers: int, pinned: bool = False, depth: int = BATCHES_AHEAD
    ) -> None:
        self.crops, self.workers, self.pinned = crops, workers, pinned
        self._ahead = depth * len(_starts(batch_size))

    def decode(self, jobs: Iterator[Job]) -> Generator[tuple[np.ndarray, Tensor]]:
        jobs, ahead = tee(jobs)
        tasks = ordered_map(self._work, self._tasks(ahead), workers=self.workers, ahead=self._ahead)
        with closing(tasks):
            for positions, _ in jobs:
                done = list(islice(tasks, len(_starts(len(positions)))))
                yield np.concatenate([task.positions for task in done]).astype(positions.dtype), done[0].images

    def identity(self) -> dict:
        return {"source": "torchvision"}

    def _tasks(self, jobs: Iterator[Job]) -> Iterator[_Task]:
        for positions, view in jobs:
            size = self.crops.size
            images = torch.empty(len(positions), size, size, 3, dtype=torch.uint8, pin_memory=self.pinned)
            for start in _starts(len(positions)):
                yield _Task(positions[start : start + _IMAGES_PER_TASK].tolist(), view, images, start)

    def _work(self, task: _Task) -> _Task:
        crops, view, missing = self.crops, task.view, []
        for place, position in enumerate(task.positions):
            kept = crops.kept(position, view)
            if kept is None:
                missing.append(place)
            else:
                task.images[task.start + place] = kept
        for place, image in zip(missing, crops.encoded([task.positions[place] for place in missing], view)):
            crop = crops.crop(image) if image is not None else None
            if crop is None:
                task.positions[place], crop = crops.next_good(task.positions[place], view)
            task.images[task.start + place] = crop
            crops.keep(task.positions[place], view, crop)
        return task
