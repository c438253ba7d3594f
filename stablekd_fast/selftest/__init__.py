"""`stablekd info --selftest`: checks whether the essential claims hold on the device at hand."""

from __future__ import annotations

import os
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stablekd_fast.cache.manifest import Manifest
from stablekd_fast.cache.shard import Part
from stablekd_fast.cache.store import RowStore
from stablekd_fast.data.dali import dali_missing, dali_remark, load_dali
from stablekd_fast.selftest.claim import Broken, Claim, NotHere
from stablekd_fast.selftest.images import IMAGES
from stablekd_fast.selftest.operators import OPERATORS
from stablekd_fast.selftest.ranks import RANKS
from stablekd_fast.selftest.training import TRAINING


def selftest(device: torch.device) -> list[dict[str, str]]:
    """Return a row for each claim: its name, how it was checked, what was found, and `pass`, `fail` or `not here`; for
    one that fails the traceback too."""
    if device.type == "cuda":  # cuBLAS adds in one order only if it is told so before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its debug modes
        return [claim.row(device) for claim in CLAIMS]


def _row_comes_back(device: torch.device) -> str:
    rows, order = torch.randn(32, 5, 7), torch.randperm(32)
    rows[0, 0, 0], rows[1, 0, 0] = torch.nan, -0.0
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest((Part("rows", torch.float32, (5, 7)),), 32, {"teacher": "self-test"})
        with RowStore(Path(folder) / "column", manifest, write=True) as store:
            store.put(order, [rows[order]])
            (found,) = store.gather(torch.arange(32))
    if not torch.equal(found.view(torch.int32), rows.view(torch.int32)):
        raise Broken("rows that were stored come back with other bits")
    return "32 rows, NaN and -0 among them"


def _dali(device: torch.device) -> str:
    missing = dali_missing()
    if missing:
        raise NotHere(missing)
    remark = dali_remark()
    return f"{load_dali().__version__}{f'; {remark}' if remark else ''}"


def _apex(device: torch.device) -> str:
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except ImportError as error:
        raise NotHere(
            "apex.optimizers.FusedAdam cannot be imported; build apex from github.com/NVIDIA/apex (not PyPI's)"
        ) from error
    try:
        return version("apex")
    except PackageNotFoundError:
        return "of unknown version"


CLAIMS = [
    *OPERATORS,
    *TRAINING,
    *IMAGES,
    *RANKS,
    Claim("a stored row comes back to the bit", _row_comes_back, "32 rows written and read"),
    Claim("NVIDIA DALI", _dali, "imported"),
    Claim("NVIDIA apex", _apex, "imported"),
]
