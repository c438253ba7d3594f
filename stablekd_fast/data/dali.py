"""Decoding by NVIDIA DALI: our order, our boxes, its decoder, which decodes no more of an image than its box needs.

On a CPU the boxes are then scaled as the torchvision source scales them, in threads: DALI's own scaling is slower
there. On a GPU decoding is DALI's "mixed" one (hardware decoder or nvJPEG), and it scales on the device. What DALI is
not given, because decoders differ in how they take it (other formats, CMYK, turned or cut short JPEGs), is decoded as
the torchvision source does it; so is a batch in which DALI finds a damaged image, which is then named and treated as
`on_bad_image` says.

`ReaderPipeline` is the other way: DALI's own readers, order and random crops, for `stream.StreamSource`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.decode import BATCHES_AHEAD, Crops, Encoded, Job
from stablekd_fast.data.images import resize
from stablekd_fast.data.records import ArchiveRecords, FileRecords, Records
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.errors import ConfigError, DataError

_READERS = 2
"""Threads that fetch bytes and draw boxes."""
_PARTS = 4
"""Of a batch, finished side by side."""
_SHUFFLED = 1024
"""Encoded images among which DALI's readers draw the next one."""

INSTALL = "pip install 'stablekd_fast[dali]'"


def dali_missing() -> str | None:
    """Why DALI cannot be used; None if it can."""
    try:
        # The package `nvidia-dali` of PyPI is an empty stub, which lacks this module.
        import nvidia.dali.fn  # noqa: F401
    except ImportError as error:
        return f"DALI is not installed ({error}); {INSTALL}"
    return None


def require_dali(source: str) -> None:
    """Raises ConfigError where DALI, which `source` needs, is not installed."""
    missing = dali_missing()
    if missing:
        raise ConfigError(f"The source {source} was asked for, but {missing}, or choose --source torchvision.")


@dataclass
class _Batch:
    """A batch on its way through the pipeline."""

    positions: np.ndarray
    view: int
    kept: dict[int, Tensor]
    """Crops that were stored, by place in the batch."""
    encoded: dict[int, Encoded | None]
    """The others by place; None for bad ones."""
    images: Tensor
    """uint8 `[N, S, S, 3]`, to be filled."""
    cuts: dict[int, Tensor] = field(default_factory=dict)
    """What DALI decoded, by place: the boxes, on a GPU scaled already."""

    @property
    def plain(self) -> list[int]:
        """Places of the images that DALI is given."""
        return [place for place, image in self.encoded.items() if image is not None and image.header.plain]


class DaliDecoder:
    """Crops of batches of up to `batch_size` images, decoded on `device` by `threads` threads, `depth` batches ahead.

    Raises ConfigError where DALI is not installed.
    """

    def __init__(
        self,
        crops: Crops,
        *,
        batch_size: int,
        threads: int,
        device: torch.device | str = "cpu",
        depth: int = BATCHES_AHEAD,
    ) -> None:
        require_dali("dali")
        self.crops, self.batch_size, self.threads = crops, batch_size, max(1, threads)
        self.device, self.depth = torch.device(device), depth
        self._pipeline: _Pipeline | None = None

    def identity(self) -> dict:
        from nvidia.dali import __version__

        return {"source": "dali", "version": __version__, "device": self.device.type}

    def decode(self, jobs: Iterator[Job]) -> Iterator[tuple[np.ndarray, Tensor]]:
        finishing = 0 if self.device.type == "cuda" else self.threads
        with closing(ordered_map(self._read, jobs, workers=_READERS, ahead=self.depth)) as batches:
            with closing(self._through_pipeline(batches)) as decoded:
                tasks = ((batch, part) for batch in decoded for part in range(_PARTS))
                with closing(ordered_map(self._finish, tasks, workers=finishing, ahead=_PARTS)) as finished:
                    for batch in islice(finished, _PARTS - 1, None, _PARTS):
                        yield batch.positions, batch.images

    def _read(self, job: Job) -> _Batch:
        positions, view = job
        kept = {place: self.crops.kept(position, view) for place, position in enumerate(positions.tolist())}
        kept = {place: crop for place, crop in kept.items() if crop is not None}
        missing = [place for place in range(len(positions)) if place not in kept]
        encoded = self.crops.encoded([int(positions[place]) for place in missing], view)
        size = self.crops.size
        images = torch.empty(len(positions), size, size, 3, dtype=torch.uint8, device=self.device)
        return _Batch(positions.copy(), view, kept, dict(zip(missing, encoded)), images)

    def _through_pipeline(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The batches with what DALI decoded, `depth` of them in its hands at a time."""
        in_flight: deque[_Batch] = deque()
        try:
            for batch in batches:
                self._start(batch)
                in_flight.append(batch)
                if len(in_flight) >= self.depth:
                    yield self._take(in_flight)
            while in_flight:
                yield self._take(in_flight)
        finally:
            if in_flight or (self._pipeline is not None and self._pipeline.holds_fillers):
                self._pipeline = None  # what is left in it belongs to nobody

    def _start(self, batch: _Batch) -> None:
        images = [batch.encoded[place] for place in batch.plain]
        if not images:
            return
        if self._pipeline is None:
            self._pipeline = _Pipeline(self.batch_size, self.threads, self.crops.size, self.device, self.depth)
        self._pipeline.start(images)

    def _take(self, in_flight: deque[_Batch]) -> _Batch:
        batch = in_flight.popleft()
        if batch.plain:
            try:
                batch.cuts = dict(zip(batch.plain, self._pipeline.take(len(batch.plain))))
            except RuntimeError:  # one damaged image spoils its batch, and the pipeline with it
                self._pipeline = None
                for other in in_flight:
                    self._start(other)
        return batch

    def _finish(self, task: tuple[_Batch, int]) -> _Batch:
        """Fill in every `_PARTS`-th image of a batch: what was stored, what DALI decoded, and what it was not given."""
        batch, first = task
        for place in range(first, len(batch.images), _PARTS):
            if place in batch.kept:
                batch.images[place] = batch.kept[place]
                continue
            cut = batch.cuts.get(place)
            crop = self._decode_alone(batch, place) if cut is None else resize(cut, self.crops.size, self.crops.size)
            batch.images[place] = crop
            self.crops.keep(int(batch.positions[place]), batch.view, crop)
        return batch

    def _decode_alone(self, batch: _Batch, place: int) -> Tensor:
        image = batch.encoded[place]
        crop = self.crops.crop(image) if image is not None else None
        if crop is None:
            batch.positions[place], crop = self.crops.next_good(int(batch.positions[place]), batch.view)
        return crop


class _Pipeline:
    """Encoded images and boxes in; out come the boxes, on a GPU scaled to `size` x `size`; several batches at a
    time."""

    def __init__(self, batch_size: int, threads: int, size: int, device: torch.device, depth: int) -> None:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = device.type == "cuda"

        @pipeline_def(
            batch_size=batch_size, num_threads=threads, device_id=_device_id(device), prefetch_queue_depth=depth
        )
        def cuts():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
            decoder = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB}
            cut = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **decoder)
            return fn.resize(cut, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True) if on_gpu else cut

        self.size, self.device = size, device
        self._dali = cuts()
        self._dali.build()
        self._to_fill = self._dali.input_feed_count("encoded")
        """Batches that DALI must be fed before it begins; it then runs all of them."""
        self._fed: deque[list[np.ndarray]] = deque(maxlen=2 * depth + 2)
        """The bytes that DALI reads, which are not copied."""
        self._last: list[Encoded] = []
        self.holds_fillers = False

    def start(self, images: list[Encoded]) -> None:
        """Begin a batch, or wait with it for others where DALI has not begun at all yet."""
        self._last = images
        self._fed.append([np.frombuffer(image.content, np.uint8) for image in images])
        self._dali.feed_input("encoded", self._fed[-1])
        self._dali.feed_input("start", [image.box[:2].astype(np.int32) for image in images])
        self._dali.feed_input("shape", [image.box[2:].astype(np.int32) for image in images])
        self._to_fill = max(0, self._to_fill - 1)
        if self._to_fill == 0:
            self._dali.schedule_run()

    def take(self, count: int) -> list[Tensor]:
        """Of the oldest batch, of `count` images. Raises RuntimeError for a damaged image; all that was begun is lost
        then."""
        while self._to_fill:  # there were too few batches for DALI to begin
            self.holds_fillers = True
            self.start(self._last)
        (output,) = self._dali.share_outputs()
        if self.device.type == "cuda":
            cuts = list(_copied_to_gpu(output, count, self.size, self.device))
        else:
            cuts = [torch.from_numpy(np.array(output.at(place))) for place in range(count)]
        self._dali.release_outputs()
        return cuts


class ReaderPipeline:
    """Batches without an end by DALI's own reader, decoder and random crops, of this rank's shard of the images.

    `samples` int64 `[N]` are read of `records`, for which `can_stream`; `size` and `jitter` are those of
    `Augmentation`. Boxes have the shares and ratios of `resized_crop_boxes`; contrast varies about mid grey, not about
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
        from nvidia.dali import fn, pipeline_def, types

        order = {"random_shuffle": True, "initial_fill": _SHUFFLED, "shard_id": rank, "num_shards": ranks}
        boxes = {"random_area": [0.08, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        decoder = {"device": "mixed" if device.type == "cuda" else "cpu", "output_type": types.RGB}
        settings = {"batch_size": batch_size, "num_threads": max(1, threads), "device_id": _device_id(device)}

        @pipeline_def(**settings, prefetch_queue_depth=depth, seed=seed)
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
            files = isinstance(records, FileRecords)
            reader = _file_reader(records, samples) if files else _tar_reader(records, samples, Path(folder))
            self._dali = crops()
            self._dali.build()

    def take(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """The next batch: places in `samples` int64 `[N]`, crops uint8 `[N, S, S, 3]` on the device, and a fair coin
        for each, bool `[N]`."""
        with _explained():
            crops, names, coins = self._dali.run()
        places = np.array([_place(names.at(k)) for k in range(self.batch_size)])
        if self.device.type == "cuda":
            images = _copied_to_gpu(crops, self.batch_size, self.size, self.device)
        else:
            images = torch.from_numpy(np.array(crops.as_array()))
        return places, images, torch.from_numpy(np.array(coins.as_array()))


def can_stream(records: Records) -> bool:
    """Whether `ReaderPipeline` reads them: image files and tars."""
    return isinstance(records, FileRecords) or all(path.suffix == ".tar" for path in records.archives)


def _file_reader(records: FileRecords, samples: np.ndarray) -> Callable:
    """A sample's place stands where DALI expects its label."""
    from nvidia.dali import fn

    files = [str(records.paths[sample]) for sample in samples.tolist()]
    return partial(fn.readers.file, files=files, labels=list(range(len(files))))


def _tar_reader(records: ArchiveRecords, samples: np.ndarray, folder: Path) -> Callable:
    """By index files, in `folder`, of these samples alone, in the order of the archive; a sample's place stands where
    its name is expected, which DALI hands on."""
    from nvidia.dali import fn

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
    """From the label of a file, or from an archive's `path:offset:name`."""
    return int(name.tobytes().rpartition(b":")[2]) if name.dtype == np.uint8 else int(name[0])


@contextmanager
def _explained() -> Iterator[None]:
    """DALI's errors, which are pages long, in one sentence and with what to do."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
        raise DataError(
            f"DALI's reader or decoder failed ({said}); in most cases it cannot say at which image. --source dali "
            "and --source "
            "torchvision name a bad image, or leave it out with --on-bad-image skip."
        ) from error


def _device_id(device: torch.device) -> int | None:
    """As DALI numbers GPUs; None stands for the CPU."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def _copied_to_gpu(crops, count: int, size: int, device: torch.device) -> Tensor:
    """DALI's crops `[N, size, size, 3]`, which lie on the device and will be overwritten there."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    copied = torch.empty(count, size, size, 3, dtype=torch.uint8, device=device)
    feed_ndarray(crops.as_tensor(), copied, cuda_stream=torch.cuda.current_stream(device))
    return copied
