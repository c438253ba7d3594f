"""Look after a cache on disk: what it holds, whether it is whole, and what may be deleted."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from stablekd_fast.cache.disk import LOCK, shards_in, unused
from stablekd_fast.cache.manifest import MANIFEST, Manifest
from stablekd_fast.cache.store import RowStore
from stablekd_fast.errors import CacheError, CacheMissing, nearest


def columns_in(directory: Path) -> list[Path]:
    """The folders of all columns. Raises CacheError if the directory does not exist or has no column."""
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))
    if not found:
        raise CacheError(f"There is no cache in {directory}; give the directory of a run's --cache.directory.")
    return found


def describe(directory: Path) -> tuple[list[dict], list[str]]:
    """One row per column: its rows in finished shards, how many views of all samples they would make, bytes, shards,
    and what the rows were made from; and messages on columns whose manifest is damaged.
    """
    rows, damaged = [], []
    for folder in columns_in(directory):
        try:
            manifest = Manifest.load(folder)
        except CacheMissing:  # it was deleted meanwhile
            continue
        except CacheError as error:
            damaged.append(str(error))
            continue
        fingerprint, data, view = (_mapping(manifest.fingerprint, *path) for path in ((), ("data",), ("view",)))
        rows.append(
            {
                "column": folder.name,
                "rows": manifest.stored,
                "views": manifest.stored / manifest.samples,
                "row_bytes": manifest.row_bytes,
                "megabytes": sum(path.stat().st_size for path in shards_in(folder)) / 1e6,
                "shards": len(manifest.shards),
                "unfinished": len(unfinished(folder)),
                "teacher": str(fingerprint.get("teacher", ""))[:8],
                "data": str(data.get("digest", ""))[:8],
                "view_seed": view.get("seed"),
                "batch_size": fingerprint.get("batch_size"),
            }
        )
    return rows, damaged


def verify(directory: Path) -> tuple[dict[str, int], list[str]]:
    """Read every row of every column, those of half-filled shards too, and compare its checksum.

    Returns how many rows each whole column has, and messages on the damaged ones.
    """
    whole, damaged = {}, []
    for folder in columns_in(directory):
        try:
            with warnings.catch_warnings(record=True) as said, RowStore(folder) as store:
                warnings.simplefilter("always")
                count, cut_off = store.verify(), store.cut_off()
        except CacheMissing:  # it was deleted meanwhile
            continue
        except CacheError as error:
            damaged.append(str(error))
            continue
        whole[folder.name] = count
        damaged += [str(warning.message) for warning in said] + cut_off
    return whole, damaged


def collect(directory: Path, columns: Sequence[str] = (), *, half_filled: bool = False) -> list[str]:
    """Delete the named columns, and with `half_filled` all shards that an interrupted run left half filled. Only files
    that the cache has written are deleted; a folder that holds others stays, with a warning.

    Returns the paths that were deleted, relative to `directory`. Raises CacheError for a column that does not exist, is
    in use or is a link; then nothing is deleted.
    """
    folders = {folder.name: folder for folder in columns_in(directory)}
    for name in columns:
        if name not in folders:
            raise CacheError(f"There is no column {name!r} in {directory}{nearest(name, folders)}.")
    chosen = [folders[name] for name in columns]
    half = [folder for folder in folders.values() if unfinished(folder)] if half_filled else []
    with contextlib.ExitStack() as all_unused:
        for folder in {*half, *chosen}:
            all_unused.enter_context(_unused(folder))
        files = [path for folder in half for path in unfinished(folder)]
        for path in files:
            path.unlink(missing_ok=True)
        deleted = [*files, *(folder for folder in chosen if _deleted(folder))]
    return [str(path.relative_to(directory)) for path in deleted]


def unfinished(folder: Path) -> list[Path]:
    """The shards of a column that an interrupted run left, or that are being written."""
    return [path for path in shards_in(folder) if path.name.startswith(".")]


@contextlib.contextmanager
def _unused(folder: Path) -> Iterator[None]:
    """A context in which nobody opens the column. Raises CacheError if somebody has it open."""
    if folder.is_symlink():
        raise CacheError(f"{folder} is a link; delete it, and what it leads to, by hand.")
    try:
        with unused(folder) as free:
            if not free:
                raise CacheError(f"{folder} is in use by another process; wait for its end, or stop it.")
            yield
    except OSError as error:
        raise CacheError(f"{error.filename or folder} cannot be deleted: {error.strerror}.") from error


def _deleted(folder: Path) -> bool:
    """Delete a column's own files: first what the manifest says of shards, last the manifest, so that a kill leaves a
    column that can be filled or deleted. Returns whether the folder is gone."""
    with contextlib.suppress(CacheError):  # a damaged one is deleted as it is
        manifest = Manifest.load(folder)
        manifest.shards = {}
        manifest.save(folder)
    temporary = re.compile(rf"\.{re.escape(MANIFEST)}\.\d+\.tmp")
    own = [*shards_in(folder), *(path for path in folder.iterdir() if temporary.fullmatch(path.name))]
    for path in [*own, folder / MANIFEST, folder / LOCK]:
        path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        others = ", ".join(sorted(os.listdir(folder))[:3])
        warnings.warn(f"{folder} stays: it holds files that the cache has not written ({others}).", stacklevel=1)
        return False
    return True


def _mapping(values: dict, *path: str) -> dict:
    """What lies at `path` in nested mappings, empty if there is none."""
    for key in path:
        values = values.get(key, {})
    return values if isinstance(values, dict) else {}
