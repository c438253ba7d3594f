"""Training images in an order of DALI's own: a stream that is read once, whose batches have no names."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.batch import Batch, normalised
from stablekd_fast.data.dali import copied_to_gpu, device_id_of, load_dali, require_dali
from stablekd_fast.data.decoders import STREAM, SourceChoice
from stablekd_fast.data.records import ArchiveRecords, FileRecords, JoinedRecords, Records
from stablekd_fast.data.source import Needed, TrainSource
from stablekd_fast.data.views import Stream, below, counter_hash, epoch_order
from stablekd_fast.errors import ConfigError, DataError


class StreamSource:
    """The training images of `source`, read, shuffled, cut and jittered by DALI itself; views, mixing and scaled
    decoding are not taken over.

    Batches have the size, type and layout of those of `source`. Each rank draws its part of a batch from its own shard
    of the images, which changes from pass to pass. Nothing is dropped: the images left at the end of a pass begin a
    batch with those of the next. Files are shuffled as a whole once, and among 1,024 from then on; archives are read in
    their order, and shuffled among 1,024.

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
        self.choice = SourceChoice(
            STREAM, "asked for: order and crops are DALI's own, and as they have no names nothing is cached"
        )

    def part(self, rank: int, ranks: int) -> StreamSource:
        """Return the same stream for one of `ranks` processes."""
        return StreamSource(self.source.part(rank, ranks))

    def batches(
        self, start_step: int, stop_step: int, dtype: torch.dtype = torch.float32, needed: Needed | None = None
    ) -> Generator[Batch]:
        """Give a batch for each of the steps start..stop-1, with images in `dtype`, whether they are `needed` or not:
        without names nobody can tell.

        A stream cannot be entered in its midst: each call begins a new pass, in an order that seed and `start_step`
        decide. Raises DataError at a bad image.
        """
        source = self.source
        split, augmentation = source.split, source.augmentation
        assert augmentation.size is not None  # every resized crop has one
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


_SHUFFLED = 1024
"""So many encoded images wait for DALI's readers to draw the next one among them."""


class ReaderPipeline:
    """Batches without an end by DALI's own reader, decoder and random crops, from this rank's shard of the images.

    Reads `samples` int64 `[N]` of `records`, for which `can_stream` holds; `size` and `jitter` are those of
    `Augmentation`. Boxes have the areas and ratios of `resized_crop_boxes`; contrast varies about mid grey, not about
    the image's own mean. Every pass shows every sample once, in an order of its own; no batch is short: where a pass
    ends within one, the next begins there.

    Raises DataError where DALI's reader or decoder fails.
    """

    def __init__(
        self,
        records: Records,
        samples: np.ndarray,
        *,
        size: int,
        jitter: float,
        batch_size: int,
        threads: int,
        device: torch.device,
        depth: int,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        dali = load_dali()
        fn, types = dali.fn, dali.types
        order = {"random_shuffle": True, "initial_fill": _SHUFFLED, "shard_id": rank, "num_shards": ranks}
        boxes = {"random_area": [0.08, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        decoder = {"device": "mixed" if device.type == "cuda" else "cpu", "output_type": types.RGB}
        settings = {"batch_size": batch_size, "num_threads": max(1, threads), "device_id": device_id_of(device)}

        @dali.pipeline_def(**settings, prefetch_queue_depth=depth, seed=seed)
        def crops():
            encoded, names = reader(**order)
            crop = fn.decoders.image_random_crop(encoded, **boxes, **decoder)
            crop = fn.resize(crop, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
            if jitter:
                varied = ("brightness", "contrast", "saturation")
                crop = fn.color_twist(
                    crop, **{name: fn.random.uniform(range=[1 - jitter, 1 + jitter]) for name in varied}
                )
            return crop, names, fn.random.coin_flip(dtype=types.BOOL)

        self.batch_size, self.size, self.device = batch_size, size, device
        with TemporaryDirectory() as folder, _explained():
            if isinstance(records, ArchiveRecords):
                reader = _tar_reader(records, samples, Path(folder))
            else:
                reader = _file_reader(records, samples)
            self._dali = crops()
            self._dali.build()

    def take(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """Return the next batch: places in `samples` int64 `[N]`, crops uint8 `[N, S, S, 3]` on the device, and a fair
        coin for each, bool `[N]`. On a CPU the crops are those of DALI, which overwrites them at the next call."""
        with _explained():
            crops, names, coins = self._dali.run()
        places = np.array([_place(names.at(k)) for k in range(self.batch_size)])
        if self.device.type == "cuda":
            images = copied_to_gpu(crops, self.batch_size, self.size, self.device)
        else:
            images = torch.from_numpy(np.asarray(crops.as_tensor()))  # `as_array` would copy
        return places, images, torch.from_numpy(np.array(coins.as_array()))


def can_stream(records: Records) -> bool:
    """Return whether `ReaderPipeline` reads them: image files of any number of folders, or tars of one source."""
    if isinstance(records, ArchiveRecords):
        return all(path.suffix == ".tar" for path in records.archives)
    if isinstance(records, JoinedRecords):
        return all(isinstance(source, FileRecords) for source in records.sources)
    return isinstance(records, FileRecords)


def _file_reader(records: Records, samples: np.ndarray) -> Callable:
    """Make a reader of image files. A sample's place stands where DALI expects its label."""
    files = [str(records.name(sample)) for sample in samples.tolist()]
    return partial(load_dali().fn.readers.file, files=files, labels=list(range(len(files))))


def _tar_reader(records: ArchiveRecords, samples: np.ndarray, folder: Path) -> Callable:
    """Make a reader of tars, by index files that it writes to `folder` and that list these samples alone, in the order
    of the archive. A sample's place stands where DALI expects its name, which it hands on."""
    fn = load_dali().fn
    paths, indices, found = [], [], records.places[samples]
    for number in np.unique(found[:, 0]).tolist():
        own = np.flatnonzero(found[:, 0] == number)
        own = own[np.argsort(found[own, 1])]
        lines = [f"jpg {found[place, 1]} {found[place, 2]} {place}\n" for place in own]
        indices.append(folder / f"{number}.idx")
        indices[-1].write_text(f"v1.2 {len(lines)}\n" + "".join(lines))
        paths.append(str(records.archives[number]))

    def reader(**order):
        encoded = fn.readers.webdataset(paths=paths, index_paths=[str(path) for path in indices], ext=["jpg"], **order)
        return encoded, fn.get_property(encoded, key="source_info")

    return reader


def _place(name: np.ndarray) -> int:
    """Read a sample's place from the label of a file, or from an archive's `path:offset:name`."""
    return int(name.tobytes().rpartition(b":")[2]) if name.dtype == np.uint8 else int(name[0])


@contextmanager
def _explained() -> Iterator[None]:
    """Say DALI's errors, which are pages long, in one sentence and with what to do."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
        raise DataError(
            f"DALI's reader or decoder failed ({said}); in most cases it cannot say at which image. --source dali and "
            "--source torchvision name a bad image, or leave it out with --on-bad-image skip."
        ) from error
