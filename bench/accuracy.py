"""Accuracy of the methods under one budget: tuned on held-out training images, tested once, several seeds.

    python -m stablekd_fast.bench.accuracy tune --data CIFAR --teacher-weights FILE --out DIR
    python -m stablekd_fast.bench.accuracy test --data CIFAR --teacher-weights FILE --out DIR

`tune` trains every candidate setting of every method with one seed and keeps the one with the best accuracy on
held-out training images; `test` trains the chosen settings with several seeds and evaluates each last checkpoint on
the test split once. Interrupted, both go on where they stopped. Two commands side by side share the work.
"""

from __future__ import annotations

import argparse
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.distiller import Distiller
from stablekd_fast.memory import keep_freed_memory
from stablekd_fast.precision import PRECISIONS
from stablekd_fast.report import read_events, read_results, summarise, write_report, write_results
from stablekd_fast.schedule import Optimizer

KL_ONLY = {"logits_options": {"kl_weight": 1.0, "ce_weight": 0.0}}
SGD = {"name": "sgd", "weight_decay": 5e-4, "nesterov": True}

CANDIDATES: dict[str, dict[str, dict]] = {
    "ce": {
        "adamw-0.01": {"optimizer": {"lr": 0.01}},
        "adamw-0.02": {"optimizer": {"lr": 0.02}},
        "sgd-0.1": {"optimizer": {**SGD, "lr": 0.1}},
    },
    "kd": {
        "adamw-0.01": {"optimizer": {"lr": 0.01}},
        "adamw-0.02": {"optimizer": {"lr": 0.02}},
        "adamw-0.04": {"optimizer": {"lr": 0.04}},
        "adamw-0.01-kl": {"optimizer": {"lr": 0.01}, **KL_ONLY},
    },
    "kd+features": {
        "adamw-0.01": {"optimizer": {"lr": 0.01}},
        "adamw-0.02": {"optimizer": {"lr": 0.02}},
        "adamw-0.04": {"optimizer": {"lr": 0.04}},
        "adamw-0.01-kl": {"optimizer": {"lr": 0.01}, **KL_ONLY},
    },
    "blocks": {
        "adamw-0.02": {"optimizer": {"lr": 0.02}},
    },
    "stablekd": {
        "adamw-0.01": {"optimizer": {"lr": 0.01}},
        "adamw-0.02": {"optimizer": {"lr": 0.02}},
        "adamw-0.04": {"optimizer": {"lr": 0.04}},
        "adamw-0.01-kl": {"optimizer": {"lr": 0.01}, **KL_ONLY},
    },
}
"""At most six settings per method."""


def run_one(arguments, method: str, name: str, settings: dict, seed: int, out: Path) -> dict | None:
    """Train one setting unless it is done or another process is at it; returns its row."""
    with claimed(out) as mine:
        if not mine:
            return None
        if (out / "results.json").exists():
            return read_results(out / "results.json")["runs"][0]
        optimizer = Optimizer(**settings["optimizer"])
        remember = arguments.remember and method != "ce"
        config = DistillConfig(
            **{**settings, "optimizer": optimizer},
            method=method,
            data=arguments.data,
            teacher=arguments.teacher,
            teacher_weights=arguments.teacher_weights,
            student=arguments.student,
            subset=arguments.subset,
            validation=arguments.validation,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            epochs=arguments.epochs,
            evaluate_every=2,
            seed=seed,
            out=str(out),
            resume=(out / "checkpoint.safetensors").exists(),
            cache=CacheSettings(plan="all", directory=f"{arguments.remember}/seed-{seed}") if remember else CacheSettings(),
        )
        Distiller(config).run(progress=False)
        return read_results(out / "results.json")["runs"][0]


@contextmanager
def claimed(out: Path) -> Iterator[bool]:
    """Whether this process holds the run `out`; a process that dies lets go."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "claim", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def tune(arguments) -> None:
    """Train every candidate once and write which is best on the held-out images."""
    rows = []
    for method in arguments.methods or CANDIDATES:
        for name, settings in CANDIDATES[method].items():
            out = Path(arguments.out) / "tune" / method / name
            run_one(arguments, method, name, settings, 0, out)
            if (out / "results.json").exists():
                held_out = [e for e in read_events(out) if e["kind"] == "evaluate" and e["split"] == "validation"]
                rows.append({"method": method, "setting": name, "held_out_accuracy": held_out[-1]["accuracy"]})
    chosen = {}
    for row in sorted(rows, key=lambda row: row["held_out_accuracy"]):
        chosen[row["method"]] = row["setting"]
    text = json.dumps({"rows": rows, "chosen": chosen, "candidates": CANDIDATES}, indent=1)
    (Path(arguments.out) / "tuning.json").write_text(text)
    print(text)


def test(arguments) -> None:
    """Train the chosen settings with several seeds; write results and report."""
    chosen = json.loads((Path(arguments.out) / "tuning.json").read_text())["chosen"]
    runs, events = [], {}
    for seed in range(arguments.seeds):
        for method in arguments.methods or CANDIDATES:
            out = Path(arguments.out) / "test" / f"{method}-{seed}"
            row = run_one(arguments, method, chosen[method], CANDIDATES[method][chosen[method]], seed, out)
            if row:
                runs.append({**row, "setting": chosen[method]})
                events[f"{method}, seed {seed}"] = read_events(out)
    write_results(Path(arguments.out) / "results.json", runs)
    title = "Methods compared under one budget"
    write_report(Path(arguments.out) / "report.html", runs, events, title, baseline="kd")
    for row in summarise(runs):
        print(row)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "test"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--teacher-weights", required=True)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--subset", type=float, default=10_000)
    parser.add_argument("--validation", type=float, default=2_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--precision", default="fp32", choices=[name for name in PRECISIONS if name != "auto"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=list(CANDIDATES))
    parser.add_argument("--remember", help="directory in which to keep the teacher's outputs between runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    {"tune": tune, "test": test}[arguments.what](arguments)


if __name__ == "__main__":
    main()
