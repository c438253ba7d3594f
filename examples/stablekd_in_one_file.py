"""StableKD (arXiv 2312.13223) is shown here in plain PyTorch, to be read from top to bottom.

A trained teacher helps a smaller student to learn, block by block:

1. Cut: `pair_blocks` divides both networks into equally many blocks, at places where their activations correspond.
2. Decompose: every student block trains alone. It is fed with the teacher's activation before it and aligned to the
   teacher's activation after it, so that no block waits until those before it have learned something.
3. Merge: neighbouring blocks become groups, within which the student hands on its own activations. In the end one
   group is left, the whole student, which trains end to end.
4. Export: the blocks are made of the student's own layers, so that its plain `state_dict` is all there is to save.

Losses and updates are those of `stablekd_fast.distill`, as a test shows; the engine adds speed, resume and reports.

    python stablekd_in_one_file.py [STEPS [FILE]]    # 8 steps or more
"""

import math
import sys

import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from stablekd_fast import kernels, pair_blocks

TEMPERATURE, KL_WEIGHT, LABEL_WEIGHT = 4.0, 0.1, 1.0
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 0.02, 0.15, 0.05

Batches = list[tuple[Tensor, Tensor]]
Groups = list[list[int]]

# Data and networks. They have nothing to do with the method: put your own in their place.


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 handwritten digits as images `[N, 3, 8, 8]`, and their labels `[N]`."""
    found = load_digits()
    images = torch.tensor(found.images / 8 - 1, dtype=torch.float32)
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), torch.tensor(found.target)


def make_batches(images: Tensor, labels: Tensor, steps: int, size: int = 32) -> Batches:
    """Deal out the images, shuffled anew for every epoch, until there is a batch for every step."""
    generator, batches = torch.Generator().manual_seed(0), []
    while len(batches) < steps:
        order = torch.randperm(len(images), generator=generator)
        batches += [(images[part], labels[part]) for part in order.split(size) if len(part) == size]
    return batches[:steps]


def network(width: int) -> nn.Sequential:
    """Build three stages of convolutions, of which the later two halve the image, and a classifier for ten classes."""
    stages, channels = [], 3
    for wide, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        first, second = nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        stages.append(nn.Sequential(first, nn.BatchNorm2d(wide), nn.ReLU(), second, nn.BatchNorm2d(wide), nn.ReLU()))
        channels = wide
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


# The method.


@torch.no_grad()
def teacher_outputs(paired, images: Tensor) -> list[Tensor]:
    """Run the teacher once and keep what comes out of each of its blocks; out of the last one come its logits.

    Where the widths differ, a fixed linear map (a bridge, which `pair_blocks` has fitted) brings the activation to
    the student's width. So it can be the target of one student block and the input of the next.
    """
    outputs, x = [], images
    for k, block in enumerate(paired.teacher_blocks):
        x = block(x)
        bridge = paired.bridge_after(k)
        outputs.append(x if bridge is None else bridge(x))
    return outputs


def group_losses(paired, groups: Groups, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Compute the loss of every group of neighbouring blocks on one batch.

    A group starts from what the teacher hands it, whatever the student's blocks before it are able to do. Apart or
    end to end is only a matter of groups: one group of all blocks starts from the images and is the plain student.
    """
    outputs, losses = teacher_outputs(paired, images), []
    for group in groups:
        x, parts = images if group[0] == 0 else outputs[group[0] - 1], []
        for k in group:
            x = paired.student_blocks[k](x)
            if k < len(paired.cuts):
                parts.append(cut_loss(x, outputs[k], paired.cuts[k].student_channel_axis))
            else:
                parts.append(head_loss(x, outputs[k], labels))
        losses.append(sum(parts))
    return losses


def cut_loss(student: Tensor, teacher: Tensor, channel_axis: int) -> Tensor:
    """Compare activations by their mean squared difference, divided by the teacher's mean square.

    So all blocks are on one scale, however large their activations are, and one learning rate suits all.
    """
    return kernels.feature_mse(student, teacher, normalize="power", channel_axis=channel_axis)


def head_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Compare logits by `KL_WEIGHT` * T^2 * KL(teacher || student) + `LABEL_WEIGHT` * cross entropy.

    `kd_loss` has weights that add up to one; multiplying by their sum gives back those above.
    """
    total = KL_WEIGHT + LABEL_WEIGHT
    return total * kernels.kd_loss(student, teacher, labels, temperature=TEMPERATURE, alpha=KL_WEIGHT / total)


def learning_rate(peak: float, progress: float) -> float:
    """Rise linearly to the peak during the warm-up, then fall as half a cosine; `progress` goes from 0 to 1."""
    if progress < WARMUP:
        return peak * max(progress / WARMUP, 0.01)
    return peak * max(0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))), 0.01)


def train(model: nn.Module, losses_of, batches: Batches, peak: float) -> list[list[float]]:
    """Take one step per batch on `losses_of(images, labels)`, a list; return these losses, step by step.

    Groups share no parameter, and the teacher's activations, with which they start, carry no gradient. So one
    backward pass from the sum and one AdamW do just what a loop and an optimizer for each group would do.
    """
    optimizer, history = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY), []
    model.train()
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(peak, step / len(batches))
        losses = losses_of(images, labels)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append([loss.item() for loss in losses])
    return history


def train_groups(paired, groups: Groups, batches: Batches, peak: float) -> list[list[float]]:
    """Train one stage of the method; its optimizer and its learning-rate cycle begin anew."""
    paired.teacher.eval()
    return train(paired.student, lambda images, labels: group_losses(paired, groups, images, labels), batches, peak)


def merge_neighbours(groups: Groups) -> Groups:
    """Join groups two by two: [[0], [1], [2], [3]] becomes [[0, 1], [2, 3]]."""
    return [[block for group in groups[i : i + 2] for block in group] for i in range(0, len(groups), 2)]


@torch.no_grad()
def renew_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Average batch-norm statistics anew; a block that trained alone holds those of the teacher's activations."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # This makes them plain averages.
    model.train()
    for images, _ in batches:
        model(images)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def main(steps: int = 600, file: str = "student.safetensors") -> None:
    """Distil a teacher into a student of a quarter of its width, and save that. Digits are too easy to show a gain."""
    torch.manual_seed(0)
    images, labels = digits()
    is_test = torch.arange(len(images)) % 5 == 0
    test, batches = (images[is_test], labels[is_test]), make_batches(images[~is_test], labels[~is_test], steps)

    teacher, student = network(width=32), network(width=8)
    train(teacher, lambda x, y: [nn.functional.cross_entropy(teacher(x), y)], batches, peak=0.002)
    print(f"teacher: accuracy {accuracy(teacher, *test):.1%} on {is_test.sum()} test images")

    paired = pair_blocks(teacher, student, images[~is_test][:256])
    print(f"{len(paired)} blocks, cut after the modules {', '.join(cut.name for cut in paired.cuts)}")

    # Most steps go to the blocks apart; what has merged is only refined, at a tenth of the learning rate. The engine
    # by default merges all blocks at once, which was better on CIFAR-10.
    apart = [[k] for k in range(len(paired))]
    neighbours, whole = merge_neighbours(apart), [list(range(len(paired)))]
    a, b = steps * 3 // 4, steps * 7 // 8
    for groups, part, factor in (apart, batches[:a], 1.0), (neighbours, batches[a:b], 0.1), (whole, batches[b:], 0.1):
        losses = train_groups(paired, groups, part, factor * LEARNING_RATE)
        renew_batch_norm(student, batches[:32])
        change = f"loss {sum(losses[0]):.3f} to {sum(losses[-1]):.3f}"
        print(f"groups {groups}, {len(part)} steps: {change}, accuracy {accuracy(student, *test):.1%}")

    safetensors.torch.save_file(student.state_dict(), file)
    loaded = network(width=8)
    loaded.load_state_dict(safetensors.torch.load_file(file))
    print(f"saved to {file}; a new network that loads it: accuracy {accuracy(loaded, *test):.1%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
