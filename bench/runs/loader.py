"""`stablekd bench loader`: images per second of every source, against torchvision's DataLoader and the bare decoder.

All contenders make the same batches: the same views of the same images in the same order, float32, normalised,
channels-last. Every one is checked against the view's definition before anything is timed. DALI's own readers alone
choose order and crops themselves: they are checked to show each image of a pass once.
"""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from stablekd_fast.bench.core import SEED, Case, Contender, Measured, measure_cases, pinned
from stablekd_fast.bench.floor import FLOOR, floor_contenders
from stablekd_fast.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Dataset,
    Split,
    StreamSource,
    TrainSource,
    open_dataset,
)
from stablekd_fast.data.dali import dali_missing
from stablekd_fast.data.formats.archives import archive_records, read_index
from stablekd_fast.data.formats.encoded import DEFAULT_CROP
from stablekd_fast.data.pixels import decode_rgb, read_header, resized_crop
from stablekd_fast.data.records import Records
from stablekd_fast.data.split import ImageFiles
from stablekd_fast.data.views import crop_offsets_and_flips, resized_crop_boxes, view_flips
from stablekd_fast.errors import DataError

VIEW = 0
PURE_DECODE = "pure decode"
TIMED_IMAGES = 960
"""A pass is at least this long, so that filling the pipelines is a small part of it."""
RESAMPLING = 0.015
"""The tolerance between resamplers of different make, over the largest normalised value.

It is about two levels of 255, as each of their two passes rounds to eight bits.
"""


@dataclass(frozen=True)
class Work:
    """What all contenders do."""

    dataset: Dataset
    batch_size: int
    workers: int
    passes: int

    @property
    def split(self) -> Split:
        return self.dataset.train

    @property
    def batches(self) -> int:
        return self.passes * (len(self.split) // self.batch_size)

    def source(self, name: str, workers: int) -> TrainSource:
        """Open a source. Every pass shows the same view, in an order of its own."""
        data = self.dataset
        batches = {"batch_size": self.batch_size, "seed": SEED, "views": 1}
        return TrainSource(self.split, data.augmentation, data.mean, data.std, **batches, source=name, workers=workers)

    def order(self) -> list[np.ndarray]:
        """Return the positions of each batch."""
        source = self.source("auto", 0)
        return [source.positions(step) for step in range(self.batches)]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 `[N, H, W, 3]` to float64 `[N, 3, H, W]`."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.dataset.mean, self.dataset.std))
        return ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def open_large(path: Path) -> Dataset:
    """Open a folder data set, or one tar archive of images in folders by class."""
    if path.suffix != ".tar":
        return open_dataset(path)
    samples = list(read_index(path))
    if not samples:
        raise DataError(f"{path} holds no images.")
    files = ImageFiles(archive_records([path], [samples]), DEFAULT_CROP)
    split = Split(torch.zeros(len(samples), dtype=torch.int64), files=files)
    augmentation = Augmentation("resized_crop", flip=True, size=DEFAULT_CROP)
    return Dataset(path.stem, ["image"], split, split, IMAGENET_MEAN, IMAGENET_STD, augmentation)


# Large images.


def _decoded(records: Records, number: int) -> Tensor:
    """Decode an image to uint8 `[3, H, W]`, by torchvision."""
    return decode_jpeg(torch.frombuffer(bytearray(records.read(number)), dtype=torch.uint8), mode=ImageReadMode.RGB)


class _LargeImages(torch.utils.data.Dataset):
    """What torchvision's users write: Pillow, crop, flip, tensor, normalise. The boxes are given, the same for all."""

    def __init__(self, work: Work, boxes: np.ndarray, flips: np.ndarray) -> None:
        self.records, self.size = work.split.records, work.dataset.augmentation.size
        self.mean, self.std = work.dataset.mean, work.dataset.std
        self.boxes, self.flips = boxes, flips

    def __getitem__(self, position: int) -> Tensor:
        return self.finish(Image.open(io.BytesIO(self.records.read(position))).convert("RGB"), position)

    def finish(self, image: Image.Image | Tensor, position: int) -> Tensor:
        image = TF.resized_crop(image, *self.boxes[position].tolist(), [self.size, self.size], antialias=True)
        if self.flips[position]:
            image = TF.hflip(image)
        image = TF.to_tensor(image) if isinstance(image, Image.Image) else TF.convert_image_dtype(image, torch.float32)
        return TF.normalize(image, self.mean, self.std)


class _LargeTensors(_LargeImages):
    """The same with torchvision's decoder and its transforms of tensors."""

    def __getitem__(self, position: int) -> Tensor:
        return self.finish(_decoded(self.records, position), position)


def large_case(work: Work) -> Case:
    """Make random resized crops of photographs."""
    headers = [read_header(work.split.records.read(k), work.split.records.name(k)) for k in range(len(work.split))]
    sizes = np.array([(header.height, header.width) for header in headers])
    ids = np.arange(len(work.split))
    boxes = resized_crop_boxes(0, ids, VIEW, sizes[:, 0], sizes[:, 1])
    flips = view_flips(0, ids, VIEW)
    order = work.order()

    def expected() -> Tensor:
        crops = []
        for k in order[0].tolist():
            crop = resized_crop(
                decode_rgb(work.split.records.read(k), work.split.records.name(k)),
                boxes[k],
                work.dataset.augmentation.size,
            )
            crops.append(crop.flip(1) if flips[k] else crop)
        return work.normalised(torch.stack(crops))

    extras = {"images": work.batches * work.batch_size}
    contenders, names = [], {"torchvision": 1e-6, **({} if dali_missing() else {"dali": RESAMPLING})}
    for name, tolerance in names.items():
        for w in _workers(work):
            call = _consumer(work, name, w)
            contenders.append(Contender(f"stablekd, {name}", call, f"{w} threads", tolerance=tolerance, role="ours"))
    if "dali" in names:
        contenders += [_stream(work, w) for w in _workers(work)]
    plain, tensors = _LargeImages(work, boxes, flips), _LargeTensors(work, boxes, flips)
    for w in _workers(work):
        contenders.append(Contender("torchvision DataLoader", _loader(plain, work, order, w), f"{w} processes"))
        contenders.append(
            Contender("torchvision DataLoader, tensors", _loader(tensors, work, order, w), f"{w} processes")
        )
    contenders.append(Contender("Pillow in threads", _threads(plain, work, order)))
    contenders.append(_pure_decode(work, order))
    name = f"{work.dataset.name}, {work.dataset.augmentation.size} px"
    return Case("loader", name, contenders, "torchvision DataLoader", expected, RESAMPLING, extras, PURE_DECODE)


def _stream(work: Work, workers: int) -> Contender:
    """Take DALI's own readers, order and crops, begun anew for each timing. The result counts the images of a pass."""
    stream = StreamSource(work.source("auto", workers))
    count = min(len(work.split), work.batches * work.batch_size)

    def call() -> Tensor:
        ids = torch.cat([batch.sample_ids for batch in stream.batches(0, work.batches)])
        return torch.tensor(len(ids[:count].unique()))

    return Contender(
        "DALI's own readers", call, f"{workers} threads", expected=lambda: torch.tensor(float(count)), tolerance=0.0
    )


def _pure_decode(work: Work, order: list[np.ndarray]) -> Contender:
    """Read and decode, and nothing else: no source that decodes whole images can be faster."""
    records = work.split.records
    pool = ThreadPoolExecutor(work.workers)

    def decode(chunk: np.ndarray) -> Tensor:
        for k in chunk.tolist():
            pixels = _decoded(records, k)
        return pixels

    def call() -> Tensor:
        chunks = [chunk for batch in order for chunk in np.array_split(batch, 4)]
        return list(pool.map(decode, chunks))[-1]

    last = int(order[-1][-1])

    def expected() -> Tensor:
        return decode_rgb(records.read(last), records.name(last)).permute(2, 0, 1).double()

    return Contender(PURE_DECODE, call, f"{work.workers} threads", expected=expected, tolerance=0.0, role="limit")


def _threads(images: _LargeImages, work: Work, order: list[np.ndarray]) -> Callable[[], Tensor]:
    pool = ThreadPoolExecutor(work.workers)

    return lambda: _first_of(
        _channels_last(list(pool.map(images.__getitem__, positions.tolist()))) for positions in order
    )


# Small images.


class _SmallImages(torch.utils.data.Dataset):
    """Arrays in memory, as torchvision's CIFAR10 holds them: Pillow image, pad, crop, flip, tensor, normalise."""

    def __init__(self, work: Work, offsets: np.ndarray, flips: np.ndarray) -> None:
        # A copy: tensors that are sent to processes move to shared memory, away from under numpy's views of them.
        self.images, self.offsets, self.flips = work.split.images.numpy().copy(), offsets, flips
        self.padding, self.mean, self.std = work.dataset.augmentation.padding, work.dataset.mean, work.dataset.std

    def __getitem__(self, position: int) -> Tensor:
        image = self.images[position]
        padded = TF.pad(Image.fromarray(image), self.padding)
        crop = TF.crop(padded, *self.offsets[position].tolist(), *image.shape[:2])
        if self.flips[position]:
            crop = TF.hflip(crop)
        return TF.normalize(TF.to_tensor(crop), self.mean, self.std)


def small_case(work: Work) -> Case:
    """Make padded crops of images that are kept in memory."""
    augmentation, ids = work.dataset.augmentation, work.split.sample_ids.numpy()
    offsets, flips = crop_offsets_and_flips(0, ids, VIEW, augmentation.padding, flip=augmentation.flip)
    order = work.order()
    images = _SmallImages(work, offsets, flips)

    def expected() -> Tensor:
        return torch.stack([images[k] for k in order[0].tolist()]).double()

    contenders = [Contender("stablekd, resident", _consumer(work, "resident", 0), role="ours")]
    contenders += [
        Contender("torchvision DataLoader", _loader(images, work, order, w), f"{w} processes") for w in _workers(work)
    ]
    contenders += _memory_floor(work, images[0].numel())
    extras = {"images": work.batches * work.batch_size}
    name = f"{work.dataset.name}, {work.split.images.shape[1]} px"
    return Case("loader", name, contenders, "torchvision DataLoader", expected, 1e-6, extras, FLOOR)


def _memory_floor(work: Work, values: int) -> list[Contender]:
    """Read the bytes of as many images, of `values` each, write them as floats, batch by batch, and nothing else."""

    def every_batch(once: Contender) -> Contender:
        return dataclasses.replace(once, call=lambda: _last_of(once.call() for _ in range(work.batches)))

    return [
        every_batch(once) for once in floor_contenders(work.batch_size * values, 4 * work.batch_size * values, "cpu")
    ]


# Images of both kinds.


def _workers(work: Work) -> tuple[int, ...]:
    """Return the numbers of workers to try. One more than asked for is tried too: while one waits another works."""
    return (work.workers, work.workers + 1)


def _consumer(work: Work, loader: str, workers: int) -> Callable[[], Tensor]:
    source = work.source(loader, workers)

    return lambda: _first_of(batch.images for batch in source.batches(0, work.batches))


def _loader(
    images: torch.utils.data.Dataset, work: Work, order: list[np.ndarray], workers: int
) -> Callable[[], Tensor]:
    # Processes as a user's are, not copies of this one with its allocator and threads; torch is imported once for all.
    processes = get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    loader = DataLoader(
        images,
        batch_sampler=[positions.tolist() for positions in order],
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context=processes,
        collate_fn=_channels_last,
    )
    return lambda: _first_of(loader)


def _channels_last(images: list[Tensor]) -> Tensor:
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


def _last_of(results: Iterator[Tensor]) -> Tensor:
    return collections.deque(results, maxlen=1)[0]


def _first_of(batches: Iterator[Tensor]) -> Tensor:
    first = None
    for batch in batches:
        first = batch if first is None else first
    return first


def run_loader(
    small: str | None,
    large: str | None,
    rounds: int,
    show: Callable[[list[dict]], None],
    *,
    batch_size: int = 64,
    workers: int | None = None,
) -> Measured:
    """Measure small images and, if there are any, photographs.

    `workers` is the number of threads or processes; all usable cores by default.
    """
    with pinned() as settings:
        workers = workers or settings["threads"]
        measured = measure_cases(cases(small, large, batch_size, workers), rounds, show)
    measured.settings = {**settings, "workers": workers, "batch_size": batch_size}
    return measured


def cases(small: str | None, large: str | None, batch_size: int, workers: int) -> Iterator[Case]:
    """Yield the case of small images, by default the digits, and that of photographs if there are any."""
    datasets = [(open_dataset(small or "digits"), small_case)] + (
        [(open_large(Path(large)), large_case)] if large else []
    )
    for dataset, case in datasets:
        batch = min(batch_size, len(dataset.train))
        per_pass = len(dataset.train) // batch * batch
        yield case(Work(dataset, batch, workers, max(1, -(-TIMED_IMAGES // per_pass))))
