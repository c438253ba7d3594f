"""Runs one diagnosis from its settings to its files: the Python side of `stablekd diagnose`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Dataset
from stablekd_fast.diagnose.settings import ARMS, NOT_USED, Probing
from stablekd_fast.diagnose.summary import Summary, summarise
from stablekd_fast.diagnose.training import Measurements, measure
from stablekd_fast.diagnose.verdict import Verdict, judge
from stablekd_fast.errors import ConfigError
from stablekd_fast.files import write_atomically
from stablekd_fast.report import machine, versions
from stablekd_fast.report.diagnosis import write_diagnosis
from stablekd_fast.report.events import plain


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, its figures, and what they say."""

    measured: Measurements
    summary: Summary
    verdict: Verdict


def diagnose(
    config: DistillConfig, probing: Probing | None = None, *, out: str | Path = "runs/diagnose", progress: bool = True,
    dataset: Dataset | None = None,
) -> Diagnosis:  # fmt: skip
    """Train a pair for a short time in both ways and look at its blocks on the way.

    Writes `diagnose.json`, `report.html` and `gap.svg` to `out`.

    Raises ConfigError, DataError, ModelError or CutError if the parts do not fit or `out` holds a diagnosis already,
    and TrainingError if a loss is not finite.
    """
    probing, path = probing or Probing(), Path(out) / "diagnose.json"
    if path.exists():
        raise ConfigError(f"{out} already holds a diagnosis. Pass another --out to keep it.")
    measured = measure(config, probing, progress=progress, dataset=dataset)
    summary = summarise(measured)
    verdict = judge(summary, measured.cuts, probing.steps)
    document = plain(
        {
            "arms": ARMS,
            "pair": f"{config.teacher} → {config.student}",
            "settings": {name: value for name, value in asdict(config).items() if name not in NOT_USED}
            | asdict(probing),
            "precision": measured.precision,
            "verdict": asdict(verdict) | {"headline": verdict.headline},
            "summary": asdict(summary),
            "machine": machine(),
            "versions": versions(),
            "blocks": measured.blocks,
            "between": measured.between,
        }
    )
    write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_diagnosis(Path(out), document)
    return Diagnosis(measured, summary, verdict)
