"""The demonstration on embedded real data: students by several methods over several seeds, and a page that compares
them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from stablekd_fast.config import DistillConfig
from stablekd_fast.data.dataset import FASHION
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError, nearest
from stablekd_fast.report import read_events, summary_table, write_report, write_results
from stablekd_fast.run.distiller import Distiller

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
    extras: dict[str, Any] = field(default_factory=dict)


def _tuned(lr: float, batch_size: int) -> dict[str, Any]:
    return {"optimizer": Optimizer(lr=lr), "batch_size": batch_size}


DEMONSTRATIONS = {
    "fashion-mnist-small": Demonstration(
        title="Fashion-MNIST: distillation methods compared",
        about="Four epochs of 4,500 small pictures of clothes",
        common={"student": "resnet20_half", "epochs": 4.0, "validation": 0.1, "log_every": 10, "evaluate_every": 0.5,
                "bn_images": 512},
        teacher="resnet32",
        methods={
            "ce": _tuned(0.02, 32),
            "kd": _tuned(0.02, 32),
            "kd+features": _tuned(0.02, 32),
            "stablekd": _tuned(0.02, 32),
        },
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
"""The settings of each method on Fashion-MNIST are the best of six on held-out training images, the same six for every
method: `stablekd_fast.bench.campaigns.demo` chose them (docs/results/demo.md). Those on digits were not chosen."""


def run_demo(out: Path, *, data: str = "fashion-mnist-small", seeds: int = 3, device: str = "auto") -> list[dict]:
    """Distil students by several methods, and compare.

    Writes `results.json` and `report.html` to `out`, and one folder per run below `out/runs`. Raises ConfigError for a
    data set that has no demonstration.
    """
    if data not in DEMONSTRATIONS:
        raise ConfigError(f"There is no demonstration of {data!r}{nearest(data, DEMONSTRATIONS)}.")
    demo, runs, events, teacher = DEMONSTRATIONS[data], [], {}, {}
    weights = FASHION_TEACHER
    if demo.teacher_epochs is not None:
        weights = out / "runs" / "teacher" / "student.safetensors"
        own = {**demo.common, "student": demo.teacher, "epochs": demo.teacher_epochs}
        teacher = asdict(_run(demo, own, "ce", 0, weights.parent, data, device, None))
    for seed in range(seeds):
        for method, settings in demo.methods.items():
            place = out / "runs" / f"{method}-{seed}"
            runs.append(asdict(_run(demo, {**demo.common, **settings}, method, seed, place, data, device, weights)))
            events[f"{method}, seed {seed}"] = read_events(place)
    write_results(out / "results.json", runs, **({"teacher": teacher} if teacher else {}))
    write_report(out / "report.html", runs, events, demo.title, baseline=demo.baseline, about=demo.about)
    Console().print(summary_table(runs, baseline=demo.baseline))
    return runs


def _run(
    demo: Demonstration, settings: dict, method: str, seed: int, out: Path, data: str, device: str, weights: Path | None
):
    config = DistillConfig(
        data=data,
        method=method,
        seed=seed,
        teacher=demo.teacher,
        teacher_weights=None if weights is None else str(weights),
        device=device,
        out=str(out),
        **settings,
    )
    return Distiller(config).run()
