"""Contrastive distillation of sentence embeddings: a small encoder learns from a larger one, and nothing is downloaded.

The text is that of Python itself: the topics of `help()` and the docstrings of the standard library. The teacher reads
a sentence as the mean of its words, and learns which sentences stand side by side. Students of an eighth of its width
are then distilled by `ContrastiveLoss` and by mean squared error, and are asked how alike held-out sentences are.

    python examples/sentence_embeddings.py            # three seeds, with the settings in CHOSEN
    python examples/sentence_embeddings.py --search   # tries those in TRIED, on sentences held out for that
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.losses import ContrastiveLoss, MSELoss

WORDS, LENGTH = 8192, 24
TEACHER = 256
TRIED = {
    "contrast": [{"lr": lr, "temperature": t, "queue": 2048} for t in (0.1, 0.2) for lr in (0.01, 0.03, 0.1)],
    "squares": [{"lr": lr, "normalize": kind} for kind in (None, "l2") for lr in (0.01, 0.03, 0.1)],
}
CHOSEN = {
    32: {
        "contrast": [
            {"by": "nearness", "lr": 0.01, "temperature": 0.1, "queue": 2048, "mapped": True},
            {"by": "teacher", "lr": 0.03, "temperature": 0.2, "queue": 2048, "mapped": True},
        ],
        "squares": [
            {"by": "nearness", "lr": 0.01, "normalize": None, "mapped": True},
            {"by": "teacher", "lr": 0.03, "normalize": "l2", "mapped": True},
        ],
    },
    8: {
        "contrast": [{"by": "both", "lr": 0.03, "temperature": 0.2, "queue": 2048, "mapped": True}],
        "squares": [
            {"by": "nearness", "lr": 0.03, "normalize": "l2", "mapped": True},
            {"by": "teacher", "lr": 0.03, "normalize": "l2", "mapped": False},
        ],
    },
}
"""What `--search` found best for each of the student's widths and each loss, by either correlation. `mapped`: cosines
are those behind the student's map to the teacher's width."""


# The text.


def texts() -> list[str]:
    """The topics of `help()`, and the docstrings of the standard library's modules, classes and functions."""
    found, library = list(topics.values()), Path(ast.__file__).parent
    for name in sorted(sys.stdlib_module_names):
        for file in sorted([*library.glob(f"{name}.py"), *library.glob(f"{name}/*.py")]):
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return found


def sections() -> list[Tensor]:
    """Texts of three and more sentences, as words' numbers int64 `[sentences, LENGTH]`, 0 behind the last word. No
    sentence comes twice."""
    seen, found = set(), []
    for text in texts():
        rows = []
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z])", paragraph):
                words = tuple(re.findall(r"[a-z]+", sentence.lower()))[:LENGTH]
                if len(words) >= 5 and ">>>" not in sentence and words not in seen:
                    seen.add(words)
                    numbers = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words]
                    rows.append(numbers + [0] * (LENGTH - len(words)))
        if len(rows) >= 3:
            found.append(torch.tensor(rows))
    return found


Pairs = tuple[Tensor, Tensor, list[int]]


def graded_pairs(sections: list[Tensor], seed: int = 0) -> Pairs:
    """Pairs of sentences, int64 `[N, LENGTH]` twice, and how near they are: 2 side by side, 1 in one text, 0 apart."""
    draw, found = random.Random(seed), []
    for here, rows in enumerate(sections):
        for at in range(len(rows) - 1):
            further = [row for place, row in enumerate(rows) if abs(place - at) > 1]
            elsewhere = sections[(here + draw.randrange(1, len(sections))) % len(sections)]
            found.append((rows[at], rows[at + 1], 2))
            found += [(rows[at], draw.choice(further), 1)] if further else []
            found.append((rows[at], draw.choice(list(elsewhere)), 0))
    left, right, grades = zip(*found)
    return torch.stack(left), torch.stack(right), list(grades)


# The networks.


class Encoder(nn.Module):
    """Sentences int64 `[N, LENGTH]` to embeddings `[N, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, width, mode="mean", padding_idx=0)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, sentences: Tensor) -> Tensor:
        words = self.words(sentences)
        return words + self.mix(words)


def optimize(module: nn.Module, lr: float, steps: int) -> Callable[[Tensor], None]:
    """Return what takes the optimizer's step for a loss: AdamW, at a rate that falls to 0."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return step


def trained_teacher(sections: list[Tensor], steps: int, batch: int = 256) -> Encoder:
    """A teacher that tells the neighbour of a sentence from the neighbours of the batch's other sentences."""
    torch.manual_seed(0)
    teacher = Encoder(TEACHER)
    left, right = (torch.cat([rows[part] for rows in sections]) for part in (slice(None, -1), slice(1, None)))
    step = optimize(teacher, 2e-3, steps)
    for _ in range(steps):
        drawn = torch.randint(len(left), (batch,))
        sentences = torch.cat([left[drawn], right[drawn]])
        sentences = sentences * (torch.rand(sentences.shape) > 0.3)  # it must not rely on single words
        both = F.normalize(teacher(sentences), dim=1)
        step(F.cross_entropy(both[:batch] @ both[batch:].T / 0.05, torch.arange(batch)))
    return teacher.eval()


def distilled(
    name: str, settings: dict, sentences: Tensor, targets: Tensor, seed: int, asked: argparse.Namespace
) -> nn.Sequential:
    """A student and its map to the teacher's width, distilled from the teacher's embeddings `targets` of sentences."""
    torch.manual_seed(seed)
    width = targets.shape[1]
    student = nn.Sequential(Encoder(asked.width), nn.Linear(asked.width, width))
    if name == "contrast":
        criterion = ContrastiveLoss(width, settings["temperature"], settings["queue"])
    else:
        criterion = MSELoss(normalize=settings["normalize"])
    step = optimize(student, settings["lr"], asked.steps)
    for _ in range(asked.steps):
        drawn = torch.randint(len(sentences), (256,))
        step(criterion(student(sentences[drawn]), targets[drawn]))
    return student.eval()


# The measurement.


@torch.no_grad()
def cosines(encoder: nn.Module, pairs: Pairs) -> Tensor:
    left, right = (torch.cat([encoder(part) for part in side.split(1024)]) for side in pairs[:2])
    return F.cosine_similarity(left, right)


def correlations(student: nn.Sequential, pairs: Pairs, teachers: Tensor) -> dict[bool, dict[str, float]]:
    """Rank correlations of the student's cosines with how near sentences stand, and with the teacher's cosines: before
    the map to the teacher's width, and behind it."""
    found = {}
    for mapped, encoder in ((False, student[0]), (True, student)):
        own = cosines(encoder, pairs)
        found[mapped] = {"nearness": spearmanr(own, pairs[2])[0], "teacher": spearmanr(own, teachers)[0]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1000, help="steps of each student")
    parser.add_argument("--width", type=int, default=32, choices=CHOSEN, help="width of the student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="try settings, on other held-out sentences")
    asked = parser.parse_args()

    found = sections()
    train, validation, test = [rows for number, rows in enumerate(found) if number % 5 > 1], found[0::5], found[1::5]
    sentences, pairs = torch.cat(train), graded_pairs(validation if asked.search else test)
    print(
        f"{len(sentences)} sentences of {len(train)} texts to learn from, {len(pairs[2])} pairs of others", flush=True
    )
    teacher = trained_teacher(train, asked.teacher_steps)
    teachers = cosines(teacher, pairs)
    with torch.no_grad():
        targets = torch.cat([teacher(part) for part in sentences.split(1024)])
    show({"loss": "the teacher", "nearness": spearmanr(teachers, pairs[2])[0]})
    seeds = [100] if asked.search else range(asked.seeds)
    tried = TRIED if asked.search else CHOSEN[asked.width]
    for name, settings in ((loss, one) for loss in tried for one in tried[loss]):
        for seed in seeds:
            student = distilled(name, settings, sentences, targets, seed, asked)
            for mapped, values in correlations(student, pairs, teachers).items():
                if settings.get("mapped", mapped) == mapped:
                    show({"loss": name, **settings, "mapped": mapped, "seed": seed, **values})


def show(row: dict) -> None:
    print(json.dumps({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}), flush=True)


if __name__ == "__main__":
    main()
