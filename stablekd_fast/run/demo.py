"""The demonstration on embedded real data: students by several methods over several seeds, and a page that compares
them."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.data.dataset import FASHION
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError, nearest
from stablekd_fast.report import read_events, summary_table, write_report, write_results
from stablekd_fast.run.distiller import STUDENT_FILE, Distiller

FASHION_TEACHER = FASHION.with_name("fashion_mnist_resnet32.safetensors")


@dataclass(frozen=True)
class Demonstration:
    """Which students are trained on which images, and how each method's are."""

    title: str
    about: str
    common: dict[str, Any]
    """Settings of all runs."""
    teacher: str
    methods: dict[str, dict[str, Any]]
    """Settings of each method's own."""
    teacher_epochs: int | None = None
    """For so many epochs a teacher is trained first; None takes the embedded one."""
    baseline: str = "kd"
    keeps_rows: bool = False
    """Whether the teacher's outputs are kept for all runs, for as long as the demonstration lasts."""


def _tuned(lr: float) -> dict[str, Any]:
    return {"optimizer": Optimizer(lr=lr)}


DEMONSTRATIONS = {
    "fashion-mnist-small": Demonstration(
        title="Fashion-MNIST: distillation methods compared",
        about="Three epochs of 4,500 small pictures of clothes",
        common={"student": "resnet20_half", "epochs": 3.0, "precision": "fp32", "batch_size": 32, "validation": 0.1,
                "log_every": 20, "evaluate_every": 1.0, "bn_images": 256, "views": 2, "view_seed": 0},
        teacher="resnet32",
        methods={"kd": _tuned(0.01), "kd+features": _tuned(0.04), "stablekd": _tuned(0.04)},
        keeps_rows=True,
    ),
    "digits": Demonstration(
        title="Digits: distillation methods compared",
        about="Three epochs of 1,294 handwritten digits",
        common={"student": "resnet20", "epochs": 3.0, "validation": 0.1, "log_every": 2, "batch_size": 64,
                "precision": "fp32"},
        teacher="resnet32",
        methods={"ce": {}, "kd": {}, "stablekd": {}},
        teacher_epochs=12,
    ),
}  # fmt: skip
"""The settings of each method on Fashion-MNIST are the best of three on held-out training images, the same three for
every method: `stablekd_fast.bench.campaigns.demo` chose them (docs/results/demo.md). Those on digits were not."""


def run_demo(out: Path, *, data: str = "fashion-mnist-small", seeds: int = 3, device: str = "auto") -> list[dict]:
    """Distil students by several methods, and compare.

    Writes `results.json` and `report.html` to `out`, and one folder per run below `out/runs`. Raises ConfigError for a
    data set that has no demonstration.
    """
    if data not in DEMONSTRATIONS:
        raise ConfigError(f"There is no demonstration of {data!r}{nearest(data, DEMONSTRATIONS)}.")
    demo, runs, events, trained = DEMONSTRATIONS[data], [], {}, {}
    common, weights = {**demo.common, "data": data, "device": device, "teacher": demo.teacher}, FASHION_TEACHER
    if demo.teacher_epochs is not None:
        own = {**common, "student": demo.teacher, "epochs": demo.teacher_epochs, "out": str(out / "runs" / "teacher")}
        trained = {"teacher": asdict(Distiller(DistillConfig(method="ce", **own)).run())}
        weights = out / "runs" / "teacher" / STUDENT_FILE
    rows = CacheSettings(plan="all", directory=str(out / "rows")) if demo.keeps_rows else CacheSettings()
    for seed in range(seeds):
        for method, settings in demo.methods.items():
            place = out / "runs" / f"{method}-{seed}"
            own = {**common, **settings, "method": method, "seed": seed, "out": str(place)}
            if method != "ce":
                own |= {"teacher_weights": str(weights), "cache": rows}
            runs.append(asdict(Distiller(DistillConfig(**own)).run()))
            events[f"{method}, seed {seed}"] = read_events(place)
    shutil.rmtree(out / "rows", ignore_errors=True)
    write_results(out / "results.json", runs, **trained)
    write_report(out / "report.html", runs, events, demo.title, baseline=demo.baseline, about=demo.about)
    Console().print(summary_table(runs, baseline=demo.baseline))
    return runs
