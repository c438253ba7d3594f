"""`python tests/proof/folding_error.py DATA WEIGHTS`: how far a resnet56 with folded norms is from float64, beside the
plain one, at each cut with a resnet20 and at the logits; of 256 test images of DATA."""

import copy
import sys

import torch
from torch import nn

from stablekd_fast import models
from stablekd_fast.blocks import pair_blocks, serve
from stablekd_fast.data import EvalSource, open_dataset
from stablekd_fast.execution.precision import Precision


def main(data: str, weights: str) -> None:
    torch.manual_seed(0)
    dataset = open_dataset(data)
    images = next(EvalSource(dataset.test, dataset.mean, dataset.std, batch_size=256).batches()).pixels
    teacher, student = (
        models.build(name, len(dataset.classes), 32).to(memory_format=torch.channels_last)
        for name in ("resnet56", "resnet20")
    )
    models.load_weights(teacher, weights)
    paired = pair_blocks(teacher.eval(), student.eval(), images[:8])
    nn.ModuleList([paired.teacher, *paired.teacher_blocks]).eval()
    exact, x = [], images.double()
    for block in paired.teacher_blocks:
        with torch.no_grad():
            x = copy.deepcopy(block).double()(x)
        exact.append(x)
    for name in ("fp32", "bf16"):
        paired.precision = Precision(name)
        plain, folded = paired.teacher_outputs(images), serve(paired, images, "on").teacher_outputs(images)
        for k, truth in enumerate(exact):
            size = truth.square().mean().sqrt()
            differences = (
                plain[k].double() - truth,
                folded[k].double() - truth,
                folded[k].double() - plain[k].double(),
            )
            errors = [float(one.square().mean().sqrt() / size) for one in differences]
            print(f"{name} block {k + 1}: plain {errors[0]:.2e}, folded {errors[1]:.2e}, apart {errors[2]:.2e}")
        alike = (plain[3].argmax(1) == folded[3].argmax(1)).float().mean()
        print(f"{name}: the same class for {alike:.2%} of the images")


main(*sys.argv[1:])
