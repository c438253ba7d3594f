"""A small run that is disturbed, and what it must come to: the bits of one left alone, and no file too many."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stablekd_fast import models
from stablekd_fast.bench.trust.calls import Trouble, build, preloaded
from stablekd_fast.cache.store import RowStore
from stablekd_fast.engine.checkpoint import load_tensors, save_tensors

SETTINGS = (
    "--data digits --teacher resnet20_half --student resnet20_half --teacher-weights {weights} --method stablekd "
    "--recipe progressive --epochs 3 --subset 96 --validation 32 --batch-size 16 --views 1 --view-seed 0 "
    "--bn-images 32 --checkpoint-every 4 --log-every 2 --precision fp32 --device cpu --timeout 30 --ema 0.9 "
    "--parallel blocks --fuse-norms off"
)
"""About 18 steps in four stages, with evaluations, checkpoints and, with a cache, one fill. What `auto` would decide by
times is set, as a run that is begun anew may decide otherwise."""
OUT_FILES = {f"{n}.safetensors" for n in ("checkpoint", "student")} | {"events.jsonl", "report.html", "results.json"}
CACHE_FILES = re.compile(r"\.lock|images-\w+\.log|[^/]+/(\.lock|manifest\.json|shard-\d+\.safetensors)")


def rows_in(store: RowStore) -> tuple[Tensor, list[Tensor]]:
    """The numbers int64 `[N]` of all rows of a store's first two views, and their parts."""
    numbers = torch.arange(2 * store.manifest.samples)
    numbers = numbers[store.present(numbers)]
    return numbers, store.gather(numbers)


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended."""

    codes: list[int]
    seconds: float
    said: str
    calls: int | None = None
    """How many watched calls there were, where that was asked."""

    @property
    def is_clear(self) -> bool:
        """Whether it ended well, in one sentence, by a signal, or was killed; no traceback."""
        return "Traceback" not in self.said and all(code in (0, 2, 130, 143, -9) for code in self.codes)


class Runs:
    """Runs in a folder of their own, each in processes forked from one that has loaded everything."""

    def __init__(self, folder: Path, *, cached: bool, ranks: int = 1) -> None:
        self.folder, self.cached, self.ranks = folder.resolve(), cached, ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        self.out, self.cache = self.folder / "out", self.folder / "cache"
        torch.manual_seed(0)
        self.weights = self.folder / "teacher.safetensors"
        save_tensors(self.weights, models.build("resnet20_half", 10, 8).state_dict(), {})
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "stablekd_fast.bench.trust.worker"],
            env=preloaded(build(self.folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._pipe(self._worker.stdout).readline() == "ready\n"

    def run(self, trouble: Trouble | None = None, *, signal: tuple[int, float] | None = None) -> Ended:
        """Begin the run, or go on with it."""
        output, count = self.folder / "said", self.folder / "count"
        for left in (output, count):
            left.unlink(missing_ok=True)
        words = [*SETTINGS.format(weights=self.weights).split(), "--out", str(self.out)]
        words += ["--resume"] if (self.out / "checkpoint.safetensors").exists() else []
        words += ["--cache.directory", str(self.cache), "--cache.plan", "all"] if self.cached else []
        job = {
            "words": ["distill", *words], "roots": [str(self.out), str(self.cache)], "ranks": self.ranks,
            "trouble": dataclasses.asdict(trouble or Trouble()), "signal": signal, "output": str(output),
            "count": str(count),
        }  # fmt: skip
        self._pipe(self._worker.stdin).write(json.dumps(job) + "\n")
        self._pipe(self._worker.stdin).flush()
        answer = json.loads(self._pipe(self._worker.stdout).readline())
        calls = int(count.read_text()) if count.exists() else None
        return Ended(**answer, said=output.read_text(errors="replace"), calls=calls)

    def finish(self, most: int = 3) -> Ended:
        """Resume until the run is at its end, as a user does who is told to; at most so often."""
        for _ in range(most):
            ended = self.run()
            if not any(ended.codes):
                break
        return ended

    def clear(self) -> None:
        """Begin anew."""
        for folder in (self.out, self.cache):
            shutil.rmtree(folder, ignore_errors=True)

    def weights_reached(self) -> dict[str, Tensor]:
        """The student that was exported, and the checkpoint's state of it."""
        found = {}
        for name in ("student", "checkpoint"):
            tensors = load_tensors(self.out / f"{name}.safetensors")[0]
            found |= {f"{name}/{key}": tensor for key, tensor in tensors.items() if not key.startswith("random/")}
        return found

    def faults(self, whole: dict[str, Tensor], ended: Ended) -> list[str]:
        """What is not as it should be after a run has come to its end."""
        if any(ended.codes):
            return [f"the resumed run ends with {ended.codes}: {ended.said[-3000:]}"]
        found = self.weights_reached()
        other = [name for name in whole if name not in found or not torch.equal(found[name], whole[name])]
        faults = (
            [f"{len(other)} tensors are others, {other[0]} for one"] if other or found.keys() != whole.keys() else []
        )
        left = {path.name for path in self.out.iterdir()} ^ OUT_FILES
        if self.cached:
            files = [str(p.relative_to(self.cache)) for p in self.cache.rglob("*") if not p.is_dir()]
            left |= {name for name in files if not CACHE_FILES.fullmatch(name)}
        return faults + ([f"files too many or too few: {', '.join(sorted(left))}"] if left else [])

    def close(self) -> None:
        """End the worker."""
        self._pipe(self._worker.stdin).close()
        self._worker.wait(30)

    @staticmethod
    def _pipe(stream):
        assert stream is not None
        return stream
