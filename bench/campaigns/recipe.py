"""Measures what each choice of the default recipe is worth: one changed at a time, several seeds, held-out images.

    python -m stablekd_fast.bench.campaigns.recipe --data CIFAR --teacher-weights FILE --out DIR

The test split is not seen. Interrupted, it goes on where it stopped; several processes side by side share the work.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from stablekd_fast.bench.campaigns.accuracy import SGD
from stablekd_fast.bench.campaigns.campaign import Campaign, add_task_arguments, recorded_settings, task_of
from stablekd_fast.bench.output import write_document
from stablekd_fast.engine.schedule import DECOMPOSED_SHARE, MERGED_LR, Optimizer
from stablekd_fast.report.terminal import print_rows

LR = Optimizer().lr
BLOCKS, HALVES, WHOLE = [[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]


def _stages(*stages: tuple[list[list[int]], float, float], **every) -> dict:
    """Make stages of groups, a fraction of the steps and a peak learning rate each; `every` goes into all of them."""
    return {
        "stages": [{"groups": groups, "share": share, "optimizer": {"lr": lr}, **every} for groups, share, lr in stages]
    }


def _two(share: float = DECOMPOSED_SHARE, lr: float = LR, merged: float = MERGED_LR, **every) -> dict:
    return _stages((BLOCKS, share, lr), (WHOLE, 1 - share, merged * lr), **every)


def _optimizer(**settings) -> dict:
    return {"optimizer": {"lr": LR, **settings}}


DEFAULT = "the default"
CHOICES: dict[str, dict[str, dict]] = {
    DEFAULT: {"": {}},
    "steps alone": {"half": _two(0.5), "seven eighths": _two(0.875), "all, never merged": {"method": "blocks"}},
    "merging": {
        "through halves": _stages((BLOCKS, 0.5, LR), (HALVES, 0.25, LR / 3), (WHOLE, 0.25, MERGED_LR * LR)),
        "progressive: three equal stages, lr halved": {"recipe": "progressive"},
    },
    "peak lr of the blocks": {
        "halved": _two(lr=LR / 2, merged=2 * MERGED_LR),
        "doubled": _two(lr=2 * LR, merged=MERGED_LR / 2),
    },
    "peak lr once merged": {"a third": _two(merged=MERGED_LR / 3), "threefold": _two(merged=3 * MERGED_LR)},
    "optimizer": {"SGD, 0.1, Nesterov": {"optimizer": {**SGD, "lr": 0.1}}},
    "cycle": {"triangular": _optimizer(cycle="triangular"), "warm-up 5 %": _optimizer(warmup=0.05)},
    "optimizer state at the merge": {"carried": _two(optimizer_state="carry")},
    "loss normalisation": {name: {"feature_options": {"normalize": value}} for name, value in
                           (("none", None), ("channel", "channel"), ("l2", "l2"))},
    "inner cuts after the merge": {"not aligned": {"align": "ends"}},
    "classifier": {"not copied": {"copy_classifier": False}},
    "head": {
        "KL only": {"logits_options": {"kl_weight": 1.0, "ce_weight": 0.0}},
        "labels only": {"logits_options": {"kl_weight": 0.0, "ce_weight": 1.0}},
        "KL weight 0.3": {"logits_options": {"kl_weight": 0.3}},
        "temperature 2": {"logits_options": {"temperature": 2.0}},
    },
    "batch-norm statistics": {"as trained": {"bn_images": 0}},
    "views": {"one": {"views": 1}, "two": {"views": 2}},
    "average of the weights": {"0.99": {"ema": 0.99}},
    "batch": {"64": {"batch_size": 64}, "128": {"batch_size": 128}},
}  # fmt: skip
"""For pairs of four blocks."""


def table(results: dict[tuple[str, str], list[float]]) -> list[dict]:
    """Return a row for each variant whose runs are there: its accuracy on held-out images by seed.

    Rows also hold the mean difference from the default over the seeds that both have.
    """
    default, rows = results.get((DEFAULT, ""), []), []
    for (choice, variant), accuracies in results.items():
        differences = [own - other for own, other in zip(accuracies, default)]
        rows.append({
            "choice": choice,
            "variant": variant,
            "accuracies": [round(100 * accuracy, 2) for accuracy in accuracies],
            "mean": 100 * statistics.fmean(accuracies),
            "against_default": 100 * statistics.fmean(differences) if differences else None,
            "spread": 100 * statistics.stdev(differences) if len(differences) > 1 else None,
        })  # fmt: skip
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", nargs="*", choices=list(CHOICES), default=list(CHOICES))
    add_task_arguments(parser, subset=5_000, epochs=4, batch_size=32)
    arguments = parser.parse_args(words)
    campaign, out, results = Campaign(task_of(arguments)), Path(arguments.out), {}
    for choice in arguments.choices:
        for variant, settings in CHOICES[choice].items():
            for seed in range(arguments.seeds):
                folder = out / f"{choice}-{variant}-{seed}".replace(" ", "-")
                row = campaign.run(folder, {"evaluate_every": 0, **settings}, seed, tuning=True)
                if row:
                    results.setdefault((choice, variant), []).append(row["accuracy"])
    rows = table(results)
    print_rows("one choice changed at a time", rows)
    write_document(out / "recipe.json", {"rows": rows}, recorded_settings(arguments))


if __name__ == "__main__":
    main()
