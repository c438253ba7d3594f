"""Random crops, flips and orders that are functions of a key, never of a generator's history.

View `v` of sample `i` under seed `s` is the same in every process, thread, source and epoch, because each random number
is a hash of its key:

    hash(f1, f2, ...) = mix(... mix(mix(VIEW_VERSION) ^ f1) ^ f2 ...)      all modulo 2**64
    mix(x): x += 0x9E3779B97F4A7C15
            x  = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
            x  = (x ^ (x >> 27)) * 0x94D049BB133111EB
            x ^ (x >> 31)

`mix` is the SplitMix64 step (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014). The
first field is a `Stream`, so that no two uses draw the same numbers. An integer in 0..n-1 is
`((hash >> 32) * n) >> 32`, a real number in [0, 1) is `(hash >> 11) / 2**53`.

A change of anything here changes every experiment and makes stored views wrong: raise `VIEW_VERSION`.
"""

from enum import IntEnum
from functools import lru_cache
from itertools import takewhile

import numpy as np

VIEW_VERSION = 1

_MASK = (1 << 64) - 1
_CROP_TRIES = 10


class Stream(IntEnum):
    """First field of every key. The numbers are part of the format."""

    CROP_TOP = 1
    CROP_LEFT = 2
    FLIP = 3
    BOX_AREA = 4
    BOX_RATIO = 5
    BOX_TOP = 6
    BOX_LEFT = 7
    ORDER = 8
    SUBSET = 9
    HOLDOUT = 10
    PARTNER = 11
    MIX_WEIGHT = 12
    CUT_ROW = 13
    CUT_COLUMN = 14
    BRIGHTNESS = 15
    CONTRAST = 16
    SATURATION = 17
    READER = 18
    OPERATION = 19
    OPERATION_SIGN = 20
    ERASED = 21
    ERASED_AREA = 22
    ERASED_RATIO = 23
    ERASED_TOP = 24
    ERASED_LEFT = 25
    SYNTHESIS = 26


def counter_hash(*fields) -> np.ndarray:
    """Hash the fields (integers, or integer arrays that broadcast) to uint64, at least one-dimensional."""
    leading = tuple(takewhile(lambda field: isinstance(field, int), fields))
    state = _hash_of_integers(leading)
    for field in fields[len(leading) :]:
        state = _mix(state ^ _as_uint64(field))
    return state


@lru_cache(maxsize=256)
def _hash_of_integers(fields: tuple[int, ...]) -> np.ndarray:
    """Hash the leading fields once: stream and seed are the same from batch to batch."""
    state = _mix(np.array([VIEW_VERSION], dtype=np.uint64))
    for field in fields:
        state = _mix(state ^ _as_uint64(field))
    state.flags.writeable = False
    return state


def crop_offsets_and_flips(
    seed: int, sample_ids: np.ndarray, view: int, padding: int, flip: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the offsets int64 `[N, 2]` (top, left; each in 0..2*padding) and flips bool `[N]` of padded crops.

    `sample_ids` is int64 `[N]`. Without `flip` the flips are all False and the offsets unchanged.
    """
    offsets = np.stack(
        [
            below(counter_hash(stream, seed, sample_ids, view), 2 * padding + 1)
            for stream in (Stream.CROP_TOP, Stream.CROP_LEFT)
        ],
        axis=1,
    )
    return offsets, view_flips(seed, sample_ids, view) & flip


def view_flips(seed: int, sample_ids: np.ndarray, view: int) -> np.ndarray:
    """Draw whether each sample is mirrored in this view: bool `[N]`, True for one half on average."""
    return below(counter_hash(Stream.FLIP, seed, sample_ids, view), 2) == 1


def resized_crop_boxes(
    seed: int,
    sample_ids: np.ndarray,
    view: int,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Draw boxes int64 `[N, 4]` (top, left, height, width, in pixels) inside images of the given sizes `[N]`.

    The box covers a fraction of the area drawn from `scale` and has width / height drawn from `ratio` (uniform in the
    logarithm), as in Szegedy et al., "Going deeper with convolutions", 2015. The first of ten draws that fits is taken;
    where none fits, the largest centred box of an allowed ratio.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    tries = np.arange(_CROP_TRIES)[:, None]

    def draw(stream: Stream) -> np.ndarray:
        return counter_hash(stream, seed, sample_ids, view, tries)

    areas = heights * widths * (scale[0] + (scale[1] - scale[0]) * unit(draw(Stream.BOX_AREA)))
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * unit(draw(Stream.BOX_RATIO)))
    box_heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    box_widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    fits = (box_heights > 0) & (box_heights <= heights) & (box_widths > 0) & (box_widths <= widths)

    first, columns = fits.argmax(axis=0), np.arange(heights.size)
    box_height, box_width = box_heights[first, columns], box_widths[first, columns]
    top = below(draw(Stream.BOX_TOP)[first, columns], heights - box_height + 1)
    left = below(draw(Stream.BOX_LEFT)[first, columns], widths - box_width + 1)
    boxes = np.stack([top, left, box_height, box_width], axis=1)
    return np.where(fits.any(axis=0)[:, None], boxes, _centred_boxes(heights, widths, ratio))


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return a permutation int64 `[count]`: positions sorted by their hash, so that it owes nothing to numpy's
    generators."""
    keys = counter_hash(Stream.ORDER, seed, epoch, np.arange(count))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_uint64(field) -> np.ndarray:
    if isinstance(field, int):
        # Arrays wrap silently where numpy's scalars would warn, hence one element and not none.
        return np.array([field & _MASK], dtype=np.uint64)
    return np.asarray(field, dtype=np.int64).astype(np.uint64)


def below(hashes: np.ndarray, bound) -> np.ndarray:
    """Turn hashes into integers int64 in 0..bound-1; `bound` (below 2**32) is a number or an array that broadcasts."""
    bound = np.asarray(bound, dtype=np.uint64)
    return (((hashes >> np.uint64(32)) * bound) >> np.uint64(32)).astype(np.int64)


def unit(hashes: np.ndarray) -> np.ndarray:
    """Turn hashes into real numbers float64 in [0, 1)."""
    return (hashes >> np.uint64(11)) * 2.0**-53


def _centred_boxes(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    box_widths = np.minimum(widths, np.maximum(1, np.rint(heights * ratio[1]).astype(np.int64)))
    box_heights = np.minimum(heights, np.maximum(1, np.rint(widths / ratio[0]).astype(np.int64)))
    tops, lefts = (heights - box_heights) // 2, (widths - box_widths) // 2
    return np.stack([tops, lefts, box_heights, box_widths], axis=1)
