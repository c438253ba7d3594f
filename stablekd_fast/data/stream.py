"""Training images in an order of DALI's own: a stream that is read once, whose batches have no names."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stablekd_fast.data.dali import ReaderPipeline, can_stream, require_dali
from stablekd_fast.data.loaders import STREAM, Loader
from stablekd_fast.data.source import Batch, Needed, TrainSource, normalised
from stablekd_fast.data.views import Stream, below, counter_hash, epoch_order
from stablekd_fast.errors import ConfigError


class StreamSource:
    """The training images of `source`, read, shuffled, cut and jittered by DALI itself; views, mixing and scaled
    decoding are not taken over.

    Batches have the size, type and layout of those of `source`, and its ranks share them, but are drawn from each
    rank's shard, which changes from pass to pass. Nothing is dropped: the images left at the end of a pass begin a
    batch with those of the next. Files are shuffled as a whole once and among 1,024 from then on; archives are read in
    their order, among 1,024.

    Raises ConfigError where DALI is not installed, and for images that lie in TFRecords or in memory.
    """

    def __init__(self, source: TrainSource) -> None:
        if source.split.resident:
            raise ConfigError(
                f"source={STREAM} decodes large images, but these are small and kept in memory; use auto or resident."
            )
        require_dali(STREAM)
        if not can_stream(source.split.records):
            raise ConfigError(
                f"source={STREAM} reads folders of image files and WebDataset tars, and these are TFRecords; use "
                "auto or dali."
            )
        self.source = source
        self.loader = Loader(
            STREAM, "asked for: order and crops are DALI's own, and as they have no names nothing is cached"
        )

    def part(self, rank: int, ranks: int) -> StreamSource:
        """The same stream for one of `ranks` processes."""
        return StreamSource(self.source.part(rank, ranks))

    def batches(
        self, start_step: int, stop_step: int, dtype: torch.dtype = torch.float32, needed: Needed | None = None
    ) -> Iterator[Batch]:
        """As many batches as there are steps from `start_step` to `stop_step` - 1, with images in `dtype`, whether they
        are
        `needed` or not: without names nobody can tell.

        A stream cannot be entered in its midst: each call begins a new pass, in an order that seed and `start_step`
        decide. Raises DataError at a bad image.
        """
        source = self.source
        split, augmentation = source.split, source.augmentation
        order = epoch_order(source.seed, start_step, len(split))
        pipeline = ReaderPipeline(
            split.records,
            split.sample_ids.numpy()[order],
            size=augmentation.size,
            jitter=augmentation.jitter,
            batch_size=source.batch_size // source.ranks,
            threads=source.workers,
            device=source.device,
            depth=source.prefetch,
            seed=int(below(counter_hash(Stream.READER, source.seed, start_step), 2**31)[0]),
            rank=source.rank,
            ranks=source.ranks,
        )
        for _ in range(start_step, stop_step):
            places, images, coins = pipeline.take()
            rows = torch.from_numpy(order[places])
            flips = (coins & augmentation.flip).to(source.device, non_blocking=True)
            images = normalised(images, source.mean, source.std, flips, dtype)
            yield Batch(split.sample_ids[rows], None, images, split.labels[rows])
