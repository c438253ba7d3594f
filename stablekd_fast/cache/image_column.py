"""The augmented images of a large data set on disk, so that later epochs decode no files."""

from __future__ import annotations

import threading
import warnings

import torch
from torch import Tensor

from stablekd_fast.cache.columns import keep_digests, open_store
from stablekd_fast.cache.fingerprint import image_fingerprint
from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.settings import CacheSettings
from stablekd_fast.cache.shard import Part
from stablekd_fast.data import TrainSource
from stablekd_fast.errors import CacheFull


class ImageColumn:
    """Decoded views uint8 `[size, size, 3]` on disk, for a `TrainSource` and the `views` that it will show.

    A view that cannot be stored is decoded again next time. The settings must name a directory.
    """

    def __init__(self, source: TrainSource, settings: CacheSettings, views: int) -> None:
        size = source.augmentation.size
        assert settings.folder is not None and size is not None
        keep_digests(source, settings)
        manifest = Manifest(
            (Part("images", torch.uint8, (size, size, 3)),), source.split.total, image_fingerprint(source)
        )
        self.store = open_store(settings.folder / "images.uint8", manifest, settings, len(source.split) * views)
        self._mutex, self._closed = threading.Lock(), not self.store.write

    def get(self, sample: int, view: int) -> Tensor | None:
        """The stored view of a sample, or None."""
        row = self._row(sample, view)
        if not bool(self.store.present(row)):
            return None
        return self.store.gather(row)[0][0]

    def put(self, sample: int, view: int, image: Tensor) -> None:
        """Store a view of a sample, if there is room. Threads may call it side by side."""
        with self._mutex:
            if self._closed:
                return
            try:
                self.store.put(self._row(sample, view), [image.contiguous()[None]])
            except CacheFull as error:
                self._closed = True
                warnings.warn(f"Images are cached no further: {error}", RuntimeWarning, stacklevel=2)

    def refresh(self) -> None:
        """Enter what other processes have stored since."""
        self.store.refresh()

    def close(self) -> None:
        """Close the files."""
        self.store.close()

    def _row(self, sample: int, view: int) -> Tensor:
        return torch.tensor([view * self.store.manifest.samples + sample])
