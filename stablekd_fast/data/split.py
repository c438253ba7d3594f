"""One split of a data set: labels, stable sample ids, and images in memory or on disk."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from stablekd_fast.data.contents import Contents
from stablekd_fast.data.pixels import BadImage, decode_rgb, read_header, resize
from stablekd_fast.data.records import Records
from stablekd_fast.data.threads import ordered_map
from stablekd_fast.data.views import Stream, counter_hash
from stablekd_fast.errors import DataError
from stablekd_fast.execution.memory import left

OnBadImage = Literal["stop", "skip"]
Used = TypeVar("Used")

# Decoding threads gain nothing beyond this: Python's part of the work holds the interpreter lock.
_MOST_THREADS = 8

# Small images decode in a tenth of a millisecond, about what handing one task to a thread costs.
_FILES_PER_TASK = 64


@dataclass(frozen=True)
class ImageFiles:
    """The encoded images of a split, and how they are read.

    `records` has one entry per sample of the whole split, so that sample ids index it. With `shape` (height, width) the
    images are small and are kept in memory, resized to it where `resizing`, else required to have it. Without `shape`
    they are large and are decoded at `crop_size` batch by batch.
    """

    records: Records
    crop_size: int
    shape: tuple[int, int] | None = None
    resizing: bool = False
    on_bad_image: OnBadImage = "stop"
    contents: Contents = field(init=False, repr=False)
    """What the images hold, shared by all parts of the split."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "contents", Contents(self.records))


def check_room(count: int, height: int, width: int, device: torch.device) -> None:
    """Raise DataError if so many images uint8 `[H, W, 3]` do not fit into what is left of a device's memory."""
    needed, there = 3 * count * height * width, left(device)
    if there is not None and needed > there:
        raise DataError(
            f"{count:,} images of {width} x {height} pixels take {needed / 1e9:.1f} GB in the memory of {device.type}, "
            f"of which {max(there, 0) / 1e9:.1f} GB are left; give a --subset, a smaller --image-size, or one above 64 "
            "pixels, at which images are read batch by batch."
        )


def no_labels(count: int) -> torch.Tensor:
    """Return what stands for the labels of images without labels, int64 `[count, 0]`."""
    return torch.empty(count, 0, dtype=torch.int64)


class Split:
    """Images, labelled or not. Sample ids index the whole split and stay the same in every subset of it.

    Images are given as an array uint8 `[N, H, W, 3]` or as `ImageFiles`. Small files are decoded when they are first
    needed, so that a subset decodes only its own. Where bad files are skipped, the length of such a split is not known
    before, so that asking for it decodes them too.

    `labels` are class indices int64 `[N]`. Images without labels have int64 `[N, 0]` (see `no_labels`): a row for each
    image and nothing in it, so that batches, ranks and buffers treat them alike and no loss can take them for classes.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        *,
        images: torch.Tensor | None = None,
        files: ImageFiles | None = None,
        sample_ids: torch.Tensor | None = None,
    ) -> None:
        self._labels = labels
        self._sample_ids = torch.arange(len(labels)) if sample_ids is None else sample_ids
        self._images = images
        self._files = files
        self._skipped: dict[Path, str] = {}
        self._whole = self
        self._all_labels = labels
        self._digest: str | None = None

    def __len__(self) -> int:
        self._settle()
        return len(self._labels)

    @property
    def labels(self) -> torch.Tensor:
        """Class indices, int64 `[N]`; `[N, 0]` where the images have none."""
        self._settle()
        return self._labels

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self._labels.dim() != 2 or self._labels.shape[1] > 0

    @property
    def sample_ids(self) -> torch.Tensor:
        """Positions in the whole split, int64 `[N]`."""
        self._settle()
        return self._sample_ids

    @property
    def resident(self) -> bool:
        """Whether the images are small and kept in memory, all of one shape."""
        return self._files is None or self._files.shape is not None

    @property
    def images(self) -> torch.Tensor:
        """Resident images, uint8 `[N, H, W, 3]`. Raises `DataError` for large ones."""
        if not self.resident:
            raise DataError("These images are too large to be kept in memory; read them through a source.")
        if self._images is None:
            self._images = self._decode()
        return self._images

    @property
    def decoded(self) -> bool:
        """Whether the images come from encoded files."""
        return self._files is not None

    @property
    def total(self) -> int:
        """How many samples the whole split has: sample ids lie in 0..total-1."""
        return len(self._files.records) if self._files is not None else len(self._whole.images)

    def identity(self) -> dict:
        """Return what images and labels the sample ids of the whole split stand for: `samples`, and a `digest`.

        Arrays are told by their content, files by their names inside the split and, up to `READ_AT_ONCE` bytes in all,
        by their content too. `keep_digests` tells larger ones.
        """
        whole = self._whole
        if whole._digest is None:
            digest = hashlib.blake2b(whole._all_labels.numpy().tobytes(), digest_size=16)
            if self._files is None:
                digest.update(str(list(whole.images.shape)).encode())
                digest.update(whole.images.contiguous().numpy().data)
            else:
                digest.update(repr((self._files.shape, self._files.resizing)).encode())
                digest.update(b"\0".join(self._files.records.told_by()))
                digest.update(self._files.contents.digest_at_once() or b"")
            whole._digest = digest.hexdigest()
        return {"samples": self.total, "digest": whole._digest}

    def keep_digests(self, path: Path) -> None:
        """Compare images too many to be read for `identity` with the log of digests at `path`, and go on with it.

        A log that is not there is begun. Raises DataError if images are others than those of the log.
        """
        if self._files is not None:
            self._files.contents.keep(path)

    def close(self) -> None:
        """Let go of the logs of digests."""
        if self._files is not None:
            self._files.contents.close()

    @property
    def paths(self) -> list[Path]:
        """Files (or places in archives) of the images, one per sample; empty where they came as an array."""
        if self._files is None:
            return []
        return [self._files.records.name(sample) for sample in self.sample_ids.tolist()]

    @property
    def crop_size(self) -> int | None:
        """Side in pixels at which large images are trained on; None for resident ones."""
        return None if self.resident else self._encoded.crop_size

    @property
    def size(self) -> int | None:
        """Side in pixels of the images that are trained on; None for resident ones that are not square."""
        if self._files is None:
            height, width = self.images.shape[1:3]
        elif self._files.shape is not None:
            height, width = self._files.shape
        else:
            return self._files.crop_size
        return int(height) if height == width else None

    def skipping(self) -> "Split":
        """Return the same images, of which those that cannot be read are left out."""
        if self._files is None or self._files.on_bad_image == "skip":
            return self
        files = replace(self._files, on_bad_image="skip")
        return Split(self._labels, images=self._images, files=files, sample_ids=self._sample_ids)

    @property
    def replaces_bad(self) -> bool:
        """Whether another image stands in for one that turns out to be bad when it is read."""
        return not self.resident and self._encoded.on_bad_image == "skip"

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """Bad files left out so far, with the reason. Large images are only judged when they are read."""
        if self.resident:
            self._settle()
        return sorted(self._skipped.items())

    def subset(self, count_or_fraction: int | float, seed: int) -> "Split":
        """Take a part of a count (int) or a fraction (float) of the samples, with the classes in the proportions of the
        whole (largest remainder).

        Which samples are taken depends on `seed` and their ids alone. Raises `DataError` when there are not enough.
        """
        count = self._count(count_or_fraction)
        return self._take(self._proportional_mask(count, Stream.SUBSET, seed))

    def holdout(self, count: int, seed: int) -> tuple["Split", "Split"]:
        """Split off `count` samples, with the classes in the proportions of the whole: (the rest, the held-out
        part)."""
        if not 0 < count < len(self._labels):
            raise DataError(
                f"Cannot hold out {count} of {len(self._labels)} images; give a count between 1 and "
                f"{len(self._labels) - 1}."
            )
        held_out = self._proportional_mask(count, Stream.HOLDOUT, seed)
        return self._take(~held_out), self._take(held_out)

    @property
    def records(self) -> Records:
        """Encoded images, numbered by sample id, where images come so."""
        return self._encoded.records

    @property
    def _encoded(self) -> ImageFiles:
        assert self._files is not None, "the images of this split came as an array"
        return self._files

    def usable(self, position: int, use: Callable[[bytes, Path, int], Used]) -> Used | None:
        """Return `use(encoded, name, sample id)` of one image; None when it raises `BadImage` and such images are
        skipped."""
        sample = int(self._sample_ids[position])
        try:
            return use(self._encoded.contents.read(sample), self.records.name(sample), sample)
        except BadImage as error:
            self.skip_or_raise(error)
            return None

    def _settle(self) -> None:
        if self._images is None and self.resident and self._encoded.on_bad_image == "skip":
            self._images = self._decode()

    def _decode(self) -> torch.Tensor:
        """Decode all small images; samples whose image is bad are left out from then on."""
        height, width = self._small_shape
        count = len(self._sample_ids)
        check_room(count, height, width, torch.device("cpu"))
        images = torch.empty(count, height, width, 3, dtype=torch.uint8)
        good = torch.zeros(count, dtype=torch.bool)

        def fill(start: int) -> None:
            for position in range(start, min(start + _FILES_PER_TASK, count)):
                image = self.usable(position, self._small)
                if image is not None:
                    images[position], good[position] = image, True

        workers = min(_MOST_THREADS, os.cpu_count() or 1)
        for _ in ordered_map(fill, range(0, count, _FILES_PER_TASK), workers=workers, ahead=2 * workers):
            pass
        if not good.any():
            path, reason = sorted(self._skipped.items())[0]
            raise DataError(f"None of {count} images can be used; the first, {path}: {reason}.")
        self._labels, self._sample_ids = self._labels[good], self._sample_ids[good]
        return images if good.all() else images[good]

    @property
    def _small_shape(self) -> tuple[int, int]:
        shape = self._encoded.shape
        assert shape is not None, "the images of this split are large"
        return shape

    def _small(self, content: bytes, name: Path, sample_id: int) -> torch.Tensor:
        header, (height, width) = read_header(content, name), self._small_shape
        if not self._encoded.resizing and (header.height, header.width) != (height, width):
            raise BadImage(
                name,
                f"it is {header.width} x {header.height} pixels and others are {width} x {height}; "
                "give an image size to have all resized",
            )
        return resize(decode_rgb(content, name, header), height, width)

    def skip_or_raise(self, error: BadImage) -> None:
        """Note a bad image as skipped, or raise its error, as was asked for."""
        if self._encoded.on_bad_image == "stop":
            raise error
        self._skipped[error.path] = error.reason

    def _count(self, count_or_fraction: int | float) -> int:
        total = len(self._labels)
        if isinstance(count_or_fraction, float):
            if not 0 < count_or_fraction <= 1:
                raise DataError(
                    f"A subset's share must be above 0 and at most 1.0, got {count_or_fraction}; "
                    "write a whole number for a count of images."
                )
            return max(1, round(count_or_fraction * total))
        if not 0 < count_or_fraction <= total:
            raise DataError(
                f"Cannot take a subset of {count_or_fraction} images from {total}; "
                f"give a count from 1 to {total} or a share such as 0.5."
            )
        return count_or_fraction

    def _proportional_mask(self, count: int, stream: Stream, seed: int) -> torch.Tensor:
        """Choose `count` samples, in each class those of the lowest hash: bool `[N]`."""
        total = len(self._labels)
        labels = self._labels.numpy() if self.labelled else np.zeros(total, np.int64)
        sizes = np.bincount(labels)
        # Whole numbers throughout: a rounded quotient would decide ties between remainders.
        quotas, remainders = np.divmod(sizes * count, total)
        most_owed = np.argsort(-remainders, kind="stable")
        quotas[most_owed[: count - quotas.sum()]] += 1

        keys = counter_hash(stream, seed, self._sample_ids.numpy())
        by_class_then_key = np.lexsort((keys, labels))
        rank_in_class = np.empty(total, dtype=np.int64)
        rank_in_class[by_class_then_key] = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return torch.from_numpy(rank_in_class < quotas[labels])

    def _take(self, mask: torch.Tensor) -> "Split":
        part = Split(
            self._labels[mask],
            images=None if self._images is None else self._images[mask],
            files=self._files,
            sample_ids=self._sample_ids[mask],
        )
        part._skipped, part._whole = dict(self._skipped), self._whole
        return part
