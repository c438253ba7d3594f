"""Measures what storing the teacher less exactly costs in accuracy: one recipe, every codec, several seeds.

    python -m stablekd_fast.bench.campaigns.codecs --data CIFAR --teacher-weights FILE --out DIR

All seeds share their views, so that a codec's rows are made once. Interrupted, it goes on where it stopped; several
processes side by side (with other --codecs) share the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from stablekd_fast.bench.campaigns.campaign import Campaign, add_task_arguments, task_of
from stablekd_fast.bench.output import write_document
from stablekd_fast.cache import CacheSettings
from stablekd_fast.report import read_events, read_results

EXACT = "fp32"
"""The codec that comes with exact logits too; all others come with float16 logits."""


def folder(arguments: argparse.Namespace, codec: str, seed: int) -> Path:
    return Path(arguments.out) / f"{codec}-{seed}"


def settings_of(arguments: argparse.Namespace, codec: str) -> dict:
    cache = CacheSettings(
        plan="all",
        directory=str(Path(arguments.out) / "cache"),
        codecs=[codec],
        logits="fp32" if codec == EXACT else "fp16",
    )
    return {"cache": cache, "views": arguments.views, "evaluate_every": 0, "optimizer": {"lr": 0.02}}


def losses(out: Path) -> list[float]:
    """Read the sum of the groups' training losses over the run, as it was logged."""
    return [sum(event["losses"].values()) for event in read_events(out) if event["kind"] == "train"]


def rows(arguments: argparse.Namespace) -> list[dict]:
    """Return for each codec the accuracy by seed, and its mean difference from the exact codec's.

    Rows also hold the largest and mean relative distance between the loss curves of the two (of one seed, logged every
    20 steps).
    """
    folders = {codec: [folder(arguments, codec, seed) for seed in range(arguments.seeds)] for codec in arguments.codecs}
    done = {codec: outs for codec, outs in folders.items() if all((out / "results.json").exists() for out in outs)}
    accuracy = {
        codec: [100 * read_results(out / "results.json")["runs"][0]["accuracy"] for out in outs]
        for codec, outs in done.items()
    }
    found = []
    for codec, outs in done.items():
        row = {"codec": codec, "accuracy": accuracy[codec], "mean": statistics.mean(accuracy[codec])}
        if EXACT in done:
            row["difference"] = row["mean"] - statistics.mean(accuracy[EXACT])
            apart = [
                abs(a / b - 1)
                for out, exact in zip(outs, done[EXACT])
                for a, b in zip(losses(out), losses(exact), strict=True)
            ]
            row |= {"loss_apart_mean": statistics.mean(apart), "loss_apart_largest": max(apart)}
        found.append(row)
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--codecs", nargs="*", default=[EXACT, "bf16", "int8", "fp8"])
    parser.add_argument("--json", help="file for the rows")
    add_task_arguments(parser, epochs=6, validation=0, batch_size=128)
    arguments = parser.parse_args(words)
    campaign = Campaign(task_of(arguments))
    for seed in range(arguments.seeds):
        for codec in arguments.codecs:
            campaign.run(folder(arguments, codec, seed), settings_of(arguments, codec), seed)
    found = rows(arguments)
    print(json.dumps(found, indent=1))
    if arguments.json:
        settings = {
            key: value
            for key, value in vars(arguments).items()
            if key not in ("data", "teacher_weights", "out", "json")
        }
        write_document(Path(arguments.json), {"rows": found}, settings)


if __name__ == "__main__":
    main()
