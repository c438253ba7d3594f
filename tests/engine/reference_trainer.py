"""Block-wise distillation in plain PyTorch: what a run must compute, and what its log must hold.

It knows nothing of the package: no blocks that were cut, no kernels, no step. Networks are lists of modules that were
cut by hand; settings are plain numbers. It computes in the type of what it is given.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F


def height(cycle, warmup, progress):
    """The learning rate at `progress` through a stage, relative to its peak."""
    if cycle == "constant":
        return 1.0
    if cycle == "triangular":
        return max(1 - abs(2 * progress - 1), 0.001)
    rising = progress / warmup if progress < warmup else None
    falling = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
    return max(falling if rising is None else rising, 0.01)


def divergence(student, teacher, temperature):
    """T^2 KL(teacher || student), the mean over images."""
    p = torch.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(torch.log_softmax(student / temperature, 1), p, reduction="batchmean")


class ReferenceTrainer:
    """Trains `student`, a list of blocks, towards `teacher`, another.

    bridges: by the number of a cut a matrix `[student width, teacher width]`, for channels on axis 1.
    inner: whether cuts inside a merged group are aligned too.
    """

    def __init__(self, teacher, student, *, bridges=None, inner=True, features=1.0, kl=0.1, ce=1.0, temperature=4.0):
        self.teacher, self.student, self.bridges = teacher, student, bridges or {}
        self.inner, self.features, self.kl, self.ce, self.temperature = inner, features, kl, ce, temperature
        self.step, self.average, self.losses, self.rates = 0, None, [], []
        self.moments = {}

    def parameters(self):
        return [parameter for block in self.student for parameter in block.parameters()]

    def outputs(self, images):
        """The teacher's output at each cut as the student sees it, and its logits."""
        found, x = [], images
        with torch.no_grad():
            for number, block in enumerate(self.teacher):
                x = block.eval()(x)
                bridge = self.bridges.get(number)
                found.append(x if bridge is None else torch.einsum("sc,nc...->ns...", bridge, x))
        return found

    def losses_of(self, group, entry, targets, labels, power):
        """Each loss of a group, in order of its blocks, and what its last block gives."""
        x, found = entry, []
        for number in group:
            x = self.student[number](x)
            if number == len(self.student) - 1:
                loss = self.kl * divergence(x, targets[number], self.temperature) if self.kl else 0.0
                found.append(loss + self.ce * F.cross_entropy(x, labels))
            elif self.inner or number == group[-1]:
                found.append(self.features * (x - targets[number]).pow(2).mean() / power[number])
        return found, x

    def train(
        self, groups, steps, batches, *, name, lr, ema=None, parts=1, clip=None, carry=False, after=None, **settings
    ):
        """Train one stage. `batches[step]` are images and labels of that step of the run; `after` is called behind
        each."""
        shape = {key: settings.pop(key) for key in ("cycle", "warmup") if key in settings}
        momentum, low = settings.pop("momentum", 0.9), settings.pop("momentum_low", None)
        optimizers = []
        for group in groups:
            own = [parameter for number in group for parameter in self.student[number].parameters()]
            kind = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
            extra = {} if name == "adamw" else {"momentum": momentum}
            optimizers.append(kind(own, lr=lr, **extra, **settings))
            for parameter in own if carry else []:
                optimizers[-1].state[parameter] = self.moments[id(parameter)]
        if ema is not None and self.average is None:
            self.average = [parameter.detach().clone() for parameter in self.parameters()]
        for block in self.student:
            block.train()
        for done in range(steps):
            now = height(shape.get("cycle", "cosine"), shape.get("warmup", 0.15), done / steps)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr * now
                if low is not None:
                    optimizer.param_groups[0]["momentum"] = momentum - (momentum - low) * now
            self.rates.append(lr * now)
            self._step(groups, optimizers, *batches[self.step], parts, clip)
            self.step += 1
            if ema is not None:
                decay = min(ema, self.step / (9 + self.step))  # steps counted from one
                for average, parameter in zip(self.average, self.parameters()):
                    average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
            if after is not None:
                after()
        self.moments = {id(p): state for optimizer in optimizers for p, state in optimizer.state.items()}

    def _step(self, groups, optimizers, images, labels, parts, clip):
        row, size = [], len(images) // parts
        whole = self.outputs(images)
        power = [target.pow(2).mean() for target in whole]
        for group, optimizer in zip(groups, optimizers):
            optimizer.zero_grad()
            total = 0.0
            for part in (slice(start, start + size) for start in range(0, len(images), size)):
                targets = [target[part] for target in whole]
                entry = images[part] if group[0] == 0 else targets[group[0] - 1]
                loss = sum(self.losses_of(group, entry, targets, labels[part], power)[0]) / parts
                loss.backward()
                total += loss.item()
            if clip is not None:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
            optimizer.step()
            row.append(total)
        self.losses.append(row)

    def probe(self, groups, batches):
        """For each group its mean loss over batches, and its last loss when the student feeds it over that when the
        teacher does."""
        blocks, fed, means = copy.deepcopy(self.student), [[0.0, 0.0] for _ in groups], [0.0] * len(groups)
        with torch.no_grad():
            for images, labels in batches:
                targets, own = self.outputs(images), images
                power = [target.pow(2).mean() for target in targets]
                for place, group in enumerate(groups):
                    entry = images if group[0] == 0 else targets[group[0] - 1]
                    losses = self.losses_of(group, entry, targets, labels, power)[0]
                    means[place] += sum(losses).item() / len(batches)
                    fed[place][0] += losses[-1].item()
                    losses, own = self.losses_of(group, own, targets, labels, power)
                    fed[place][1] += losses[-1].item()
        for block, before in zip(self.student, blocks):
            block.load_state_dict(before.state_dict())  # batch norms have seen what they must not remember
        return means, [student / teacher for teacher, student in fed]

    def evaluate(self, batches, held_out):
        """Accuracy, top-5 accuracy and mean cross entropy on held-out batches of the student composed of its blocks (or
        of their average), with batch-norm statistics that are means over `batches`; and that student."""
        model = copy.deepcopy(nn.Sequential(*self.student)).eval()
        if self.average is not None:
            for parameter, average in zip(model.parameters(), self.average):
                parameter.data.copy_(average)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        seen = {norm: [] for norm in norms}
        for norm in norms:
            norm.train()
            norm.register_forward_pre_hook(lambda norm, given: seen[norm].append(given[0]))
        with torch.no_grad():
            for images, _ in batches:
                model(images)
            for norm, inputs in seen.items():
                norm.eval()
                norm.running_mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
                norm.running_var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
            logits, labels = (
                torch.cat(them) for them in zip(*[(model(images), labels) for images, labels in held_out])
            )
        top = logits.argsort(1, descending=True)[:, :5] == labels[:, None]
        loss = -torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels].mean()
        reached = top[:, 0].double().mean().item(), top.any(1).double().mean().item(), loss.item()
        return reached, model
