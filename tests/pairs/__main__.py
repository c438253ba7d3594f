"""Pairs of networks, drawn once by a seed, before the work that they are to judge.

python tests/pairs draw --seed 1    # which pairs; refused where they are drawn already
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomllib

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUTCOMES, PAGE = ROOT / "docs" / "results" / "pairs.jsonl", ROOT / "docs" / "results" / "pairs.md"
NETWORKS = tomllib.loads((HERE / "networks.toml").read_text())
DRAWN = HERE / "drawn.json"

Names = list[str]


def _names(kind: str) -> Names:
    """The networks of a kind for 224 pixels, as `stablekd_fast.models.build` names them."""
    return [f"{library}/{name}" for library in ("torchvision", "timm") for name in NETWORKS[library][kind]]


def draw(seed: int) -> None:
    """Choose 120 pairs, among them 60 with attention. The network with more parameters will teach the other one."""
    if DRAWN.exists():
        sys.exit(f"{DRAWN} exists: what was drawn stays, or the work was done for other pairs.")
    generator = random.Random(seed)
    convolution, attention = _names("convolution"), _names("attention")

    def both(names: Names) -> Callable[[], Names]:
        return lambda: generator.sample(names, 2)

    kinds: list[tuple[int, int, Callable[[], Names]]] = [
        (16, 32, both(NETWORKS["cifar"]["convolution"])),
        (44, 224, both(convolution)),
        (30, 224, both(attention)),
        (30, 224, lambda: [generator.choice(convolution), generator.choice(attention)]),
    ]
    chosen: dict[tuple[str, ...], int] = {}
    for count, size, drawn in kinds:
        wanted = len(chosen) + count
        while len(chosen) < wanted:
            chosen.setdefault(tuple(sorted(drawn())), size)
    rows = [{"networks": list(names), "size": size} for names, size in chosen.items()]
    DRAWN.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")


def pairs() -> list[dict]:
    """The pairs that were drawn."""
    return json.loads(DRAWN.read_text())


def outcomes() -> dict[int, dict]:
    """What is known, by the pair's number; of several outcomes the last counts."""
    lines = OUTCOMES.read_text().splitlines() if OUTCOMES.exists() else []
    return {row["pair"]: row for row in map(json.loads, lines)}


def run(again: bool, only: list[int], workers: int) -> None:
    """Try pairs, each in a process of its own."""
    known = outcomes()
    asked = only or [number for number in range(len(pairs())) if again or number not in known]

    def one(number: int) -> None:
        command = [sys.executable, str(HERE), "trial", str(number)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
            row = {**pairs()[number], "outcome": "wrong", "wrong": [last]}
        else:
            row = json.loads(ended.stdout.splitlines()[-1])
        row = {"pair": number, **row}
        with OUTCOMES.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = row.get("sentence") or "; ".join(row.get("wrong", [])) or ", ".join(row.get("cuts", []))
        print(f"{number:3} {row['outcome']:7} {pairs()[number]['networks']}: {said}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, asked))


def report() -> None:
    """Write the table."""
    known, kinds = outcomes(), Counter(row["outcome"] for row in outcomes().values())
    start, _, rest = PAGE.read_text().partition("<!-- pairs -->\n")
    _, _, end = rest.partition("<!-- end of pairs -->\n")
    lines = [f"{len(known)} of {len(pairs())} pairs tried: {dict(kinds)}.", ""]
    lines += [
        "| pair | teacher | student | pixels | outcome | blocks | largest block |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in sorted(known.items()):
        teacher, student = (
            row.get(role, name) for role, name in zip(("teacher", "student"), row.get("networks", "??"))
        )
        what = (
            row["outcome"]
            if row["outcome"] == "works"
            else f"{row['outcome']}: " + (row.get("sentence") or "; ".join(row["wrong"])).replace("|", "/")
        )
        blocks = len(row["cuts"]) + 1 if "cuts" in row else "–"
        share = f"{row['largest_block']:.0%}" if "largest_block" in row else "–"
        lines.append(f"| {number} | {teacher} | {student} | {row['size']} | {what} | {blocks} | {share} |")
    PAGE.write_text(f"{start}<!-- pairs -->\n" + "\n".join(lines) + f"\n<!-- end of pairs -->\n{end}")


def trial(number: int) -> None:
    """Try one pair here, and print what came of it as JSON."""
    import torch
    from trial import try_pair

    torch.set_num_threads(1)
    one = pairs()[number]
    print(json.dumps(try_pair(one["networks"], one["size"], number)))


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python tests/pairs", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("draw").add_argument("--seed", type=int, required=True)
    parsed = commands.add_parser("run")
    parsed.add_argument("--again", action="store_true", help="those whose outcome is known, too")
    parsed.add_argument("--only", type=int, action="append", default=[], help="the pair of this number")
    parsed.add_argument("--workers", type=int, default=2)
    commands.add_parser("report")
    commands.add_parser("trial").add_argument("number", type=int)
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.seed)
    elif given.command == "run":
        run(given.again, given.only, given.workers)
    elif given.command == "report":
        report()
    else:
        trial(given.number)


if __name__ == "__main__":
    main()
