"""Look after a cache on disk: what it holds, whether it is whole, and what may be deleted."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from stablekd_fast.cache.disk import SUFFIX, is_locked
from stablekd_fast.cache.manifest import MANIFEST, Manifest
from stablekd_fast.cache.store import RowStore
from stablekd_fast.errors import CacheError, nearest


def columns_in(directory: Path) -> list[Path]:
    """The folders of all columns. Raises CacheError if the directory does not exist or has no column."""
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))
    if not found:
        raise CacheError(f"There is no cache in {directory}; give the directory of a run's --cache.directory.")
    return found


def describe(directory: Path) -> list[dict]:
    """One row per column: its finished rows, how many views of all samples they would make, bytes, shards, and what the
    rows were made from.

    Raises CacheError if a manifest is damaged.
    """
    rows = []
    for folder in columns_in(directory):
        manifest = Manifest.load(folder)
        finished = sum(shard["rows"] for shard in manifest.shards.values())
        fingerprint = manifest.fingerprint
        rows.append(
            {
                "column": folder.name,
                "rows": finished,
                "views": finished / manifest.samples,
                "row_bytes": manifest.row_bytes,
                "megabytes": sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}")) / 1e6,
                "shards": len(manifest.shards),
                "unfinished": len(unfinished(folder)),
                "teacher": fingerprint.get("teacher", "")[:8],
                "data": fingerprint["data"]["digest"][:8],
                "view_seed": fingerprint["view"]["seed"],
                "batch_size": fingerprint.get("batch_size"),
            }
        )
    return rows


def verify(directory: Path) -> tuple[dict[str, int], list[str]]:
    """Read every finished row of every column and compare its checksum.

    Returns how many rows each whole column has, and messages on the damaged ones.
    """
    whole, damaged = {}, []
    for folder in columns_in(directory):
        try:
            with RowStore(folder) as store:
                whole[folder.name] = store.verify()
        except CacheError as error:
            damaged.append(str(error))
    return whole, damaged


def collect(directory: Path, columns: Sequence[str] = (), *, half_filled: bool = False) -> list[str]:
    """Delete the named columns, and with `half_filled` all shards that a writer left half filled.

    Returns the paths that were deleted, relative to `directory`. Raises CacheError for a column that does not exist or
    is being written; then nothing is deleted.
    """
    folders = {folder.name: folder for folder in columns_in(directory)}
    for name in columns:
        if name not in folders:
            raise CacheError(f"There is no column {name!r} in {directory}{nearest(name, folders)}.")
    chosen = [folders[name] for name in columns]
    files = [path for folder in folders.values() for path in unfinished(folder)] if half_filled else []
    for path in [*files, *(path for folder in chosen for path in unfinished(folder))]:
        if is_locked(path):
            raise CacheError(f"{path} is being written; wait for that run, or stop it.")
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    for folder in chosen:
        shutil.rmtree(folder)
    return [str(path.relative_to(directory)) for path in [*files, *chosen]]


def unfinished(folder: Path) -> list[Path]:
    """The shards of a column that are not full."""
    return sorted(folder.glob(f".shard-*{SUFFIX}"))
