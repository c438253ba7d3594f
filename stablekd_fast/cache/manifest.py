"""What a column holds, as JSON that carries its own digest: parts of a row, fingerprint, finished shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from stablekd_fast.cache.disk import is_shard
from stablekd_fast.cache.shard import MOST_ROWS, REMEDY, Part
from stablekd_fast.errors import CacheError, CacheFull, CacheMissing, TrainingError
from stablekd_fast.files import write_atomically
from stablekd_fast.files.reading import check_format, read_document

FORMAT = 2
MANIFEST = "manifest.json"


@dataclass
class Manifest:
    """What the rows of a column are, and which shards are finished."""

    parts: tuple[Part, ...]
    samples: int
    """The samples of the whole data set: the row of a view has the number view * samples + sample."""
    fingerprint: dict
    """What the rows depend on."""
    shards: dict[str, dict] = field(default_factory=dict)
    """For each finished file how many `rows` it has room for, how many of them are `used`, and as `index` the digest of
    its keys and checksums."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(part.bytes for part in self.parts)

    @property
    def stored(self) -> int:
        """Rows in finished shards."""
        return sum(shard["used"] for shard in self.shards.values())

    @property
    def column(self) -> str:
        """A digest of what the rows are, which each shard carries."""
        return _digest(self._rows())

    def _rows(self) -> dict:
        """What the rows are, as JSON types."""
        parts = [part.plain() for part in self.parts]
        return {"parts": parts, "samples": self.samples, "fingerprint": self.fingerprint}

    def save(self, folder: Path) -> None:
        """Write the manifest, whole or not at all. Raises CacheFull if the disk refuses."""
        content = {"format": FORMAT, **self._rows(), "shards": self.shards}
        text = json.dumps({**content, "digest": _digest(content)}, indent=1, sort_keys=True)
        try:
            write_atomically(folder / MANIFEST, text.encode())
        except TrainingError as error:
            raise CacheFull(f"The manifest of {folder} was refused: {error.__cause__}. Free some space.") from error

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read the manifest of a folder. Raises CacheError if there is none, if it is damaged, or of another format."""
        path = folder / MANIFEST
        try:
            content = json.loads(read_document(path))
            if content.pop("digest") != _digest(content):
                raise CacheError(f"{path} is not what was written there: it is damaged. {REMEDY}")
            check_format(str(path), content["format"], FORMAT, CacheError, REMEDY)
            return Manifest._from_plain(content)
        except FileNotFoundError:
            raise CacheMissing(f"{folder} is no column of a cache: it has no {MANIFEST}.") from None
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise CacheError(f"{path} cannot be read ({error!r:.200}). {REMEDY}") from error

    @staticmethod
    def _from_plain(content: dict) -> Manifest:
        """The manifest of JSON types. Raises ValueError, LookupError, AttributeError or TypeError for what none can
        be."""
        manifest = Manifest(
            tuple(Part.from_plain(part) for part in content["parts"]),
            content["samples"],
            {**content["fingerprint"]},
            {**content["shards"]},
        )
        if not manifest.parts or not _counts(manifest.samples):
            raise ValueError(f"{len(manifest.parts)} parts of {manifest.samples!r} samples")
        for name, shard in manifest.shards.items():
            if not is_shard(name) or not _counts(shard["rows"]) or not 0 < shard["used"] <= shard["rows"]:
                raise ValueError(f"a shard {name!r}: {shard!r}")
            if type(shard["used"]) is not int or type(shard["index"]) is not str:
                raise ValueError(f"a shard {name!r}: {shard!r}")
        return manifest

    def check_same(self, wanted: Manifest, folder: Path) -> None:
        """Raise CacheError, listing what differs, unless rows of `wanted` are the very rows that are stored here."""
        stored, now = (
            _flat({"parts": [part.plain() for part in one.parts], "samples": one.samples, **one.fingerprint})
            for one in (self, wanted)
        )
        differing = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
        if differing:
            listed = "; ".join(f"{key}: stored {stored.get(key)!r}, now {now.get(key)!r}" for key in differing)
            raise CacheError(
                f"The rows in {folder} were made for something else ({listed}). Use another --cache.directory, or "
                f"delete them with `stablekd cache gc {folder.parent} --columns {folder.name}`."
            )

    def check_parts(self, count: int, parts: Sequence[Tensor], folder: Path) -> None:
        """Raise CacheError unless `parts` are `count` rows of this kind, contiguous and on the CPU."""
        found = [(tuple(part.shape), part.dtype, part.device.type, part.is_contiguous()) for part in parts]
        needed = [((count, *part.shape), part.dtype, "cpu", True) for part in self.parts]
        if found != needed:
            raise CacheError(
                f"Rows of {folder} have the parts {needed} (shape, dtype, device, contiguous); got {found}."
            )


def _counts(value: object) -> bool:
    return type(value) is int and 0 < value <= MOST_ROWS


def _digest(content: dict) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _flat(values: dict, lead: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{lead}{key}.") if isinstance(value, dict) else {f"{lead}{key}": value}
    return flat
