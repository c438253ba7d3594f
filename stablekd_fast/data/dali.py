"""Decoding by NVIDIA DALI: our order, our boxes, its decoder, which decodes no more of an image than its box needs.

On a CPU the boxes are then scaled as the torchvision source scales them, in threads: DALI's own scaling is slower
there. On a GPU decoding is DALI's "mixed" one (hardware decoder or nvJPEG), and it scales on the device. Images that
decoders differ on (other formats, CMYK, turned or cut short JPEGs) are not given to DALI but decoded as the torchvision
source does it; so is a batch in which DALI finds a damaged image, which is then named and treated as `on_bad_image`
says.

The other way to use DALI, with its own readers, order and random crops, is `dali_stream.StreamSource`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.augmentation import Augmentation
from stablekd_fast.data.crops import BATCHES_AHEAD, Crops, Encoded, Job
from stablekd_fast.data.pixels import resize
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.errors import ConfigError

_READERS = 2
"""So many threads fetch bytes and draw boxes."""
_IDLE = 2
"""So many pipelines wait for their next iteration: training's, and that of an evaluation in its midst."""
_PARTS = 4
"""So many parts of a batch are finished side by side."""

_EXTRAS = {12: "dali-cuda12", 13: "dali-cuda13"}
"""The extra of this package that brings DALI, by the CUDA major that torch is built for."""


def dali_install() -> str:
    """Return the command that installs the DALI for the torch at hand."""
    extra = _EXTRAS.get(_torch_major() or 0, "dali")
    return f"pip install 'stablekd_fast[{extra}]'"


def _torch_major() -> int | None:
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def dali_remark() -> str | None:
    """Return what to say where DALI and torch are built for different CUDA majors; on a CPU it does not matter."""
    ours, theirs = _torch_major(), load_dali().__cuda_version__ // 1000
    if ours in (None, theirs):
        return None
    return f"DALI is built for CUDA {theirs} and torch for CUDA {ours}; {dali_install()} brings the DALI for this torch"


def dali_missing() -> str | None:
    """Return why DALI cannot be used; None if it can."""
    try:
        # The package `nvidia-dali` of PyPI is an empty stub, which lacks this module.
        import nvidia.dali.fn  # noqa: F401
    except ImportError as error:
        return f"DALI is not installed ({error}); {dali_install()}"
    return None


def require_dali(source: str) -> None:
    """Raise ConfigError where DALI, which `source` needs, is not installed."""
    missing = dali_missing()
    if missing:
        raise ConfigError(f"The source {source} was asked for, but {missing}, or choose --source torchvision.")


def load_dali() -> Any:
    """Return the package. It goes untyped, as its stubs lack `types` and declare what may be left out as needed."""
    import nvidia.dali.fn
    import nvidia.dali.types

    return nvidia.dali


@dataclass
class _Batch:
    """A batch on its way through the pipeline."""

    positions: np.ndarray
    view: int
    kept: dict[int, Tensor]
    """The crops that were stored, by place in the batch."""
    encoded: dict[int, Encoded | None]
    """The others by place; None for bad ones."""
    cuts: dict[int, Tensor] = field(default_factory=dict)
    """What DALI decoded, by place: the boxes, on a GPU scaled already."""
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    """The crops of the batch, uint8 `[N, S, S, 3]`: those that DALI made, if it made all; else to be filled."""
    whole: bool = False
    """Whether DALI made all of `images`."""

    @property
    def plain(self) -> dict[int, Encoded]:
        """The images that DALI is given, by place."""
        return {place: image for place, image in self.encoded.items() if image is not None and image.header.plain}


class DaliDecoder:
    """Decodes batches of up to `batch_size` images on `device` with `threads` threads, `depth` batches ahead.

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
        self._idle: list[_Pipeline] = []
        """Empty pipelines. Each iteration has one to itself while it lasts: what comes out of a pipeline belongs to
        whoever put it in."""

    def identity(self) -> dict:
        return {"source": "dali", "version": load_dali().__version__, "device": self.device.type}

    def decode(self, jobs: Iterator[Job]) -> Generator[tuple[np.ndarray, Tensor]]:
        finishing = 0 if self.device.type == "cuda" else self.threads
        with closing(ordered_map(self._read, jobs, workers=_READERS, ahead=self.depth)) as batches:
            with closing(self._through_pipeline(batches)) as decoded:
                tasks = ((batch, part) for batch in decoded for part in range(_PARTS))
                with closing(ordered_map(self._finish, tasks, workers=finishing, ahead=_PARTS)) as finished:
                    for batch in islice(finished, _PARTS - 1, None, _PARTS):
                        yield batch.positions, batch.images

    def _read(self, job: Job) -> _Batch:
        positions, view = job
        stored = {place: self.crops.kept(position, view) for place, position in enumerate(positions.tolist())}
        kept = {place: crop for place, crop in stored.items() if crop is not None}
        missing = [place for place in range(len(positions)) if place not in kept]
        encoded = self.crops.encoded([int(positions[place]) for place in missing], view)
        return _Batch(positions.copy(), view, kept, dict(zip(missing, encoded)))

    def _through_pipeline(self, batches: Iterator[_Batch]) -> Generator[_Batch]:
        """Have DALI decode the batches, `depth` of them in its hands at a time."""
        flight = _Flight(self._pipeline)
        try:
            for batch in batches:
                flight.start(batch)
                if len(flight) >= self.depth:
                    yield self._with_room(flight.take())
            while len(flight):
                yield self._with_room(flight.take())
        finally:
            pipeline = flight.end()
            if pipeline is not None and len(self._idle) < _IDLE:
                self._idle.append(pipeline)

    def _with_room(self, batch: _Batch) -> _Batch:
        """Give a batch memory for its crops, unless DALI has made all of them."""
        if not batch.whole:
            size = self.crops.size
            batch.images = torch.empty(len(batch.positions), size, size, 3, dtype=torch.uint8, device=self.device)
        return batch

    def _pipeline(self) -> _Pipeline:
        """Return a pipeline that nobody uses."""
        try:
            return self._idle.pop()
        except IndexError:
            return _Pipeline(self.batch_size, self.threads, self.crops.augmentation, self.device, self.depth)

    def _finish(self, task: tuple[_Batch, int]) -> _Batch:
        """Fill in every `_PARTS`-th image of a batch: what was stored, what DALI decoded, and what it was not given.
        Where DALI made all of them, they are stored, if anywhere."""
        batch, first = task
        if batch.whole and self.crops.stored is None:
            return batch
        for place in range(first, len(batch.images), _PARTS):
            if place in batch.kept:
                batch.images[place] = batch.kept[place]
                continue
            cut = batch.cuts.get(place)
            crop = self._decode_alone(batch, place) if cut is None else self._scaled(cut)
            if not batch.whole:
                batch.images[place] = crop
            self.crops.keep(int(batch.positions[place]), batch.view, crop)
        return batch

    def _scaled(self, cut: Tensor) -> Tensor:
        return resize(cut, self.crops.size, self.crops.size, self.crops.augmentation.interpolation)

    def _decode_alone(self, batch: _Batch, place: int) -> Tensor:
        image = batch.encoded[place]
        crop = self.crops.crop(image) if image is not None else None
        if crop is None:
            batch.positions[place], crop = self.crops.next_good(int(batch.positions[place]), batch.view)
        return crop


class _Flight:
    """The batches of one iteration that are in a pipeline of its own, which `board` gives; in their order."""

    def __init__(self, board: Callable[[], _Pipeline]) -> None:
        self._board = board
        self._pipeline: _Pipeline | None = None
        self._batches: deque[_Batch] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def start(self, batch: _Batch) -> None:
        """Begin a batch."""
        self._batches.append(batch)
        self._feed(batch)

    def take(self) -> _Batch:
        """Return the oldest batch with what DALI decoded of it; with nothing if DALI gave up on it."""
        batch = self._batches.popleft()
        places = list(batch.plain)
        if places:
            assert self._pipeline is not None
            try:
                cuts = self._pipeline.take(len(places))
                batch.cuts = dict(zip(places, cuts))
                if isinstance(cuts, Tensor) and len(places) == len(batch.positions):
                    batch.images, batch.whole = cuts, True
            except RuntimeError:  # one damaged image spoils its batch, and the pipeline with it
                self._pipeline = None
                for other in self._batches:
                    self._feed(other)
        return batch

    def end(self) -> _Pipeline | None:
        """Give up the batches that are left, and return the pipeline, empty; None if there is none that is sound."""
        pipeline, self._pipeline = self._pipeline, None
        self._batches.clear()
        try:
            if pipeline is not None:
                pipeline.drain()
        except RuntimeError:  # an image that nobody waits for is damaged
            return None
        return pipeline

    def _feed(self, batch: _Batch) -> None:
        images = list(batch.plain.values())
        if not images:
            return
        if self._pipeline is None:
            self._pipeline = self._board()
        self._pipeline.start(images)


class _Pipeline:
    """Takes encoded images and their boxes, and gives the pixels in the boxes, on a GPU scaled to `size` x `size`.
    Several batches are in it at a time."""

    def __init__(
        self, batch_size: int, threads: int, augmentation: Augmentation, device: torch.device, depth: int
    ) -> None:
        dali, on_gpu, size = load_dali(), device.type == "cuda", augmentation.size
        assert size is not None
        fn, types = dali.fn, dali.types
        kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[augmentation.interpolation]

        @dali.pipeline_def(
            batch_size=batch_size, num_threads=threads, device_id=device_id_of(device), prefetch_queue_depth=depth
        )
        def cuts():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
            decoder = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB}
            cut = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **decoder)
            return fn.resize(cut, size=[size, size], interp_type=kind, antialias=True) if on_gpu else cut

        self.size, self.device = size, device
        self._dali = cuts()
        self._dali.build()
        self._to_fill = self._dali.input_feed_count("encoded")
        """How many batches DALI must still be fed before it begins; it then runs all of them."""
        self._fed: deque[list[np.ndarray]] = deque(maxlen=2 * depth + 2)
        """The bytes that DALI reads, which are not copied."""
        self._last: list[Encoded] = []
        self._inside = 0
        """How many batches were begun and not taken."""

    def start(self, images: list[Encoded]) -> None:
        """Begin a batch, or wait with it for others where DALI has not begun at all yet."""
        self._last = images
        self._inside += 1
        self._fed.append([np.frombuffer(image.content, np.uint8) for image in images])
        self._dali.feed_input("encoded", self._fed[-1])
        self._dali.feed_input("start", [image.box[:2].astype(np.int32) for image in images])
        self._dali.feed_input("shape", [image.box[2:].astype(np.int32) for image in images])
        self._to_fill = max(0, self._to_fill - 1)
        if self._to_fill == 0:
            self._dali.schedule_run()

    def take(self, count: int) -> Tensor | list[Tensor]:
        """Return the boxes of the oldest batch, of `count` images; on a GPU scaled, uint8 `[count, size, size, 3]`.
        Raises RuntimeError for a damaged image, and loses all that was begun."""
        output = self._next()
        # The one copy that is needed: from here on DALI makes a later batch in the memory of this one.
        if self.device.type == "cuda":
            cuts = copied_to_gpu(output, count, self.size, self.device)
        else:
            cuts = [torch.from_numpy(np.array(output.at(place))) for place in range(count)]
        self._dali.release_outputs()
        return cuts

    def drain(self) -> None:
        """Let all that was begun come out, for nobody. Raises RuntimeError for a damaged image."""
        while self._inside:
            self._next()
            self._dali.release_outputs()

    def _next(self) -> Any:
        while self._to_fill:  # there were too few batches for DALI to begin
            self.start(self._last)
        self._inside -= 1
        (output,) = self._dali.share_outputs()
        return output


def device_id_of(device: torch.device) -> int | None:
    """Return the number that DALI gives to a GPU; None stands for the CPU."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def copied_to_gpu(crops: Any, count: int, size: int, device: torch.device) -> Tensor:
    """Copy DALI's crops `[N, size, size, 3]`, which lie on the device and will be overwritten there."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    copied = torch.empty(count, size, size, 3, dtype=torch.uint8, device=device)
    feed_ndarray(crops.as_tensor(), copied, cuda_stream=torch.cuda.current_stream(device))
    return copied
