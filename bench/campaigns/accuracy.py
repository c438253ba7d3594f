"""Compares the accuracy of methods under one budget: tuned on held-out images, tested once, with several seeds.

    python -m stablekd_fast.bench.campaigns.accuracy tune --data CIFAR --teacher-weights FILE --out DIR
    python -m stablekd_fast.bench.campaigns.accuracy test --data CIFAR --teacher-weights FILE --out DIR

`tune` trains every candidate setting of every method with one seed and keeps the one with the best accuracy on
held-out training images, without the test split; `test` trains the chosen settings with several seeds and evaluates
each last checkpoint on the test split once. Interrupted, both go on where they stopped. Two commands side by side share
the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from stablekd_fast.bench.campaigns.campaign import Campaign, add_task_arguments, task_of
from stablekd_fast.errors import StableKDError
from stablekd_fast.files import write_atomically
from stablekd_fast.report import read_events, summarise, write_report, write_results

SGD = {"name": "sgd", "weight_decay": 5e-4, "nesterov": True}


def _lr(lr: float, **settings) -> dict:
    return {"optimizer": {"lr": lr}, **settings}


CANDIDATES: dict[str, dict[str, dict]] = {
    "ce": {"0.01": _lr(0.01), "0.02": _lr(0.02), "sgd-0.1": {"optimizer": {**SGD, "lr": 0.1}}},
    "kd": {
        "0.01": _lr(0.01),
        "0.02": _lr(0.02),
        "0.01, batch 32": _lr(0.01, batch_size=32),
    },
    "kd+features": {
        "0.02": _lr(0.02),
        "0.04": _lr(0.04),
        "0.02, batch 32": _lr(0.02, batch_size=32),
    },
    "blocks": {"0.02, batch 32": _lr(0.02, batch_size=32)},
    "stablekd": {
        "0.02": _lr(0.02),
        "0.02, batch 32": _lr(0.02, batch_size=32),
        "0.03, batch 32": _lr(0.03, batch_size=32),
    },
}
"""At most six settings per method: peak learning rates, of AdamW unless said."""


def tune(campaign: Campaign, out: Path, methods: list[str]) -> None:
    """Train every candidate once and write which is best on the held-out images."""
    rows = []
    for method in methods:
        for name, settings in CANDIDATES[method].items():
            own = {**settings, "method": method, "evaluate_every": 0}
            row = campaign.run(out / "tune" / method / name, own, 0, tuning=True)
            if row:
                rows.append({"method": method, "setting": name, "held_out_accuracy": row["accuracy"]})
    chosen = {row["method"]: row["setting"] for row in sorted(rows, key=lambda row: row["held_out_accuracy"])}
    text = json.dumps({"rows": rows, "chosen": chosen, "candidates": CANDIDATES}, indent=1)
    write_atomically(out / "tuning.json", text.encode())
    print(text)


def tuned_settings(path: Path) -> dict[str, dict]:
    """Read the chosen settings of each method from a file of `tune`. Raises StableKDError if it is not such a file."""
    try:
        tuning = json.loads(path.read_text())
        return {method: tuning["candidates"][method][name] for method, name in tuning["chosen"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StableKDError(
            f"{path} holds no tuned settings ({error!r}); give the tuning.json that `accuracy tune` wrote."
        ) from error


def test(campaign: Campaign, out: Path, tuned: dict[str, dict], methods: list[str], seeds: int) -> list[dict]:
    """Train the chosen settings with several seeds; write results and report; return a row for each method."""
    runs, events = [], {}
    for seed in range(seeds):
        for method in methods:
            own = out / "test" / f"{method}-{seed}"
            row = campaign.run(own, {**tuned[method], "method": method, "evaluate_every": 2}, seed)
            if row:
                runs.append(row)
                events[f"{method}, seed {seed}"] = read_events(own)
    write_results(out / "results.json", runs)
    write_report(out / "report.html", runs, events, "Methods compared under one budget", baseline="kd")
    return summarise(runs)


def test_subsets(campaign: Campaign, out: Path, subsets: list[float], *rest) -> None:
    """Call `test` for each number of training images, with a folder of its own where there are several."""
    for subset in subsets:
        own = Campaign(dataclasses.replace(campaign.task, subset=subset), campaign.dataset)
        for row in test(own, out / f"{subset:g}" if len(subsets) > 1 else out, *rest):
            print({"subset": subset, **row})


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "test"])
    parser.add_argument("--methods", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--tuning", help="the tuning.json to test; by default that in the output folder")
    parser.add_argument("--subsets", nargs="*", type=float, help="test with each of these numbers of training images")
    add_task_arguments(parser)
    arguments = parser.parse_args(words)
    campaign, out = Campaign(task_of(arguments)), Path(arguments.out)
    if arguments.what == "tune":
        tune(campaign, out, arguments.methods)
    else:
        tuned = tuned_settings(Path(arguments.tuning or out / "tuning.json"))
        test_subsets(campaign, out, arguments.subsets or [arguments.subset], tuned, arguments.methods, arguments.seeds)


if __name__ == "__main__":
    main()
