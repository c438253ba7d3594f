"""The demonstration on embedded real data: a teacher, then students by three methods over several seeds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from stablekd_fast.config import DistillConfig
from stablekd_fast.report import read_events, summary_table, write_report, write_results
from stablekd_fast.run.distiller import Distiller

TEACHER = "resnet32"
TEACHER_EPOCHS = 12
STUDENT = "resnet20"
STUDENT_EPOCHS = 3
METHODS = ("ce", "kd", "stablekd")


def run_demo(out: Path, *, seeds: int = 3, device: str = "auto") -> list[dict]:
    """Train a teacher on the handwritten digits, distil students from it, and compare.

    Writes `results.json` and `report.html` to `out`, and one folder per run below `out/runs`.
    """
    common = {
        "data": "digits",
        "device": device,
        "batch_size": 64,
        "validation": 0.1,
        "log_every": 2,
        "precision": "fp32",
    }
    teacher_out = out / "runs" / "teacher"
    teacher = Distiller(
        DistillConfig(method="ce", student=TEACHER, epochs=TEACHER_EPOCHS, out=str(teacher_out), **common)
    ).run()
    runs, events = [], {}
    for method in METHODS:
        for seed in range(seeds):
            run_out = out / "runs" / f"{method}-{seed}"
            config = DistillConfig(
                method=method,
                seed=seed,
                epochs=STUDENT_EPOCHS,
                teacher=TEACHER,
                teacher_weights=str(teacher_out / "student.safetensors"),
                student=STUDENT,
                out=str(run_out),
                **common,
            )
            runs.append(asdict(Distiller(config).run()))
            events[f"{method}, seed {seed}"] = read_events(run_out)
    write_results(out / "results.json", runs, teacher=asdict(teacher))
    write_report(out / "report.html", runs, events, "Digits: distillation methods compared", baseline="kd")
    Console().print(summary_table(runs, baseline="kd"))
    return runs
