"""One pair of networks: cut, compared with the plain networks, trained for three steps, exported and read again."""

from __future__ import annotations

import copy
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stablekd_fast import distill, models
from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.blocks.modes import untouched
from stablekd_fast.data import Augmentation, Dataset, Split
from stablekd_fast.engine.schedule import Stage
from stablekd_fast.errors import StableKDError
from stablekd_fast.models.outputs import logits_of
from stablekd_fast.models.weights import restore_state

CLASSES, BATCH, STEPS = 10, 8, 3
GRADIENTS_AGREE = 1e-10
"""In float64: a share of the parameter's largest gradient ..."""
NOISE = 1e-3
"""... and this of the network's largest: a bias that a batch norm follows has rounding errors for a gradient."""


def smooth_images(count: int, size: int, seed: int) -> Tensor:
    """Images uint8 `[N, size, size, 3]`: a few random colours blown up, as smooth as photographs."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (count, 3, 6, 6), generator=generator).float()
    images = nn.functional.interpolate(colours, size=(size, size), mode="bicubic").clamp(0, 255)
    return images.to(torch.uint8).movedim(1, -1).contiguous()


def try_pair(names: list[str], size: int, seed: int) -> dict[str, Any]:
    """What came of a pair: `outcome` is `works`, `refused` (with the sentence) or `wrong` (with what was wrong)."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    networks = sorted(
        ((name, models.build(name, CLASSES, size)) for name in names),
        key=lambda pair: -sum(parameter.numel() for parameter in pair[1].parameters()),
    )
    (teacher_name, teacher), (student_name, student) = networks
    row: dict[str, Any] = {"teacher": teacher_name, "student": student_name, "size": size}
    try:
        row |= _checked(student_name, teacher.eval(), student, size)
        row["outcome"] = "wrong" if row["wrong"] else "works"
    except StableKDError as error:
        row |= {"outcome": "refused", "sentence": str(error)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _checked(name: str, teacher: nn.Module, student: nn.Module, size: int) -> dict[str, Any]:
    images = (smooth_images(BATCH, size, 1).movedim(-1, 1).float() / 255 - 0.5) / 0.25
    paired = pair_blocks(teacher, student, images)
    wrong = []
    for role, model, blocks, modes in (
        ("teacher", teacher, paired.teacher_blocks, (False,)),
        ("student", student, paired.student_blocks, (False, True)),
    ):
        for training in modes:
            plain, composed = _outputs(model, blocks, images[:2], training)
            if not torch.equal(plain, composed):
                wrong.append(f"{role} differs {'in training' if training else 'in evaluation'}")
    wrong += _gradients_apart(paired, images[:2])
    wrong += _three_steps(name, paired, size)
    cuts = [cut.name for cut in paired.cuts]
    shares = [flops / max(sum(paired.student_flops), 1) for flops in paired.student_flops]
    return {"cuts": cuts, "largest_block": round(max(shares), 3), "wrong": wrong}


def _outputs(model: nn.Module, blocks: list[nn.Module], images: Tensor, training: bool) -> list[Tensor]:
    holder, found = nn.ModuleList([model, *blocks]), []
    holder.train(training)
    for run in (lambda x: logits_of(model(x)), nn.Sequential(*blocks)):
        with untouched(model):
            torch.manual_seed(2)
            found.append(run(images.clone()))
    return found


def _gradients_apart(paired: PairedBlocks, images: Tensor) -> list[str]:
    """Parameters that get other gradients through the blocks than through the plain student."""
    student = paired.student.double().train()
    nn.ModuleList(paired.student_blocks).train()
    saved = {key: value.clone() for key, value in student.state_dict().items()}
    found = []
    for run in (lambda x: logits_of(student(x)), nn.Sequential(*paired.student_blocks)):
        torch.manual_seed(2)
        output = run(images.double())
        weights = torch.linspace(-1, 1, CLASSES, dtype=output.dtype)
        found.append(torch.autograd.grad((output * weights).sum(), list(student.parameters()), allow_unused=True))
        restore_state(student, saved)
    apart, largest = [], max(float(gradient.abs().max()) for gradient in found[0] if gradient is not None)
    for (name, _), plain, composed in zip(student.named_parameters(), *found):
        if (plain is None) != (composed is None):
            apart.append(f"gradient of {name} in one of the two only")
        elif plain is not None and (plain - composed).abs().max() > GRADIENTS_AGREE * (
            plain.abs().max() + NOISE * largest
        ):
            apart.append(f"gradient of {name} differs")
    student.float()
    return apart[:3]


def _three_steps(name: str, paired: PairedBlocks, size: int) -> list[str]:
    """Train apart for two steps and merged for one; what the exported file lacks."""
    count = STEPS * BATCH
    labels = torch.arange(count) % CLASSES
    dataset = Dataset(
        "pictures",
        [str(label) for label in range(CLASSES)],
        Split(labels, images=smooth_images(count, size, 2)),
        Split(labels[:CLASSES], images=smooth_images(CLASSES, size, 3)),
        (0.5, 0.5, 0.5),
        (0.25, 0.25, 0.25),
        Augmentation("pad_crop", flip=True, padding=2),
    )
    blocks = len(paired)
    stages = [Stage([[block] for block in range(blocks)], steps=2), Stage([list(range(blocks))], steps=1)]
    before = copy.deepcopy(paired.student.state_dict())
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = distill(
            paired=paired, dataset=dataset, student=name, stages=stages, epochs=1.0, batch_size=BATCH, validation=0.0,
            precision="fp32", capture="eager", bn_images=BATCH, out=f"{out}/run", progress=False,
        )  # fmt: skip
        fresh = models.build(name, CLASSES, size)
        models.load_weights(fresh, Path(out) / "run" / "student.safetensors")
    wrong = [] if result.steps == STEPS else [f"{result.steps} steps"]
    after = fresh.state_dict()
    trained = {key for key, value in paired.student.named_parameters() if value.requires_grad}
    still = [key for key in sorted(trained) if torch.equal(before[key], after[key]) and before[key].numel() > 1]
    wrong += [f"{key} was not trained" for key in still[:3]]
    wrong += [f"{key} is not finite" for key, value in after.items() if not value.isfinite().all()][:3]
    return wrong
