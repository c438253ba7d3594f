"""Pairs of networks, drawn once by a seed, before the work that they are to judge.

python tests/pairs draw --seed 1    # which pairs; refused where they are drawn already
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
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


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python tests/pairs", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("draw").add_argument("--seed", type=int, required=True)
    draw(parser.parse_args().seed)


if __name__ == "__main__":
    main()
