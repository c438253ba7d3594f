"""A stand-in for mdistiller, which is not on PyPI: the parts that a distiller meets, written after its contract in own
words.

- `Distiller(student, teacher)` calls `forward_train(image=, target=, epoch=)` in training, which gives (logits, dict of
  losses), and in evaluation gives the student's logits; its teacher stays in evaluation mode. Models give (logits, dict
  of features).
- `distiller_dict` maps `DISTILLER.TYPE` to a class that is made as `(student, teacher, cfg)`.
- `CFG` is a tree of settings (yacs) that refuses names which it does not have.
- The trainer (`train` below) takes SGD over `get_learnable_parameters()`, adds up the means of all losses, and counts
  epochs
  from 1.

Where the real package can be imported, the tests take that instead.
"""

import copy
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn


class Settings(dict):
    """A node of the tree."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    __setattr__ = dict.__setitem__

    def clone(self):
        return copy.deepcopy(self)

    def merge_from_list(self, pairs):
        for path, value in zip(pairs[::2], pairs[1::2]):
            *parents, last = path.split(".")
            node = self
            for name in parents:
                node = node[name]
            assert last in node, f"Non-existent key: {path}"
            node[last] = value


def settings(**values):
    return Settings({name: settings(**value) if isinstance(value, dict) else value for name, value in values.items()})


class Distiller(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self):
        return list(self.student.parameters())

    def get_extra_parameters(self):
        return 0

    def forward_train(self, **batch):
        raise NotImplementedError

    def forward(self, **batch):
        return self.forward_train(**batch) if self.training else self.student(batch["image"])[0]


def both(distiller, image):
    student, own = distiller.student(image)
    with torch.no_grad():
        teacher, hints = distiller.teacher(image)
    return student, teacher, own["feats"], hints["feats"]


class KD(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.temperature = cfg.KD.TEMPERATURE
        self.ce_loss_weight, self.kd_loss_weight = cfg.KD.LOSS.CE_WEIGHT, cfg.KD.LOSS.KD_WEIGHT

    def forward_train(self, image, target, **others):
        student, teacher, _, _ = both(self, image)
        p = F.softmax(teacher / self.temperature, dim=1)
        divergence = (p * (p.log() - F.log_softmax(student / self.temperature, dim=1))).sum(
            1
        ).mean() * self.temperature**2
        return student, {
            "loss_ce": self.ce_loss_weight * F.cross_entropy(student, target),
            "loss_kd": self.kd_loss_weight * divergence,
        }


class DKD(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.ce_loss_weight, self.temperature, self.warmup = cfg.DKD.CE_WEIGHT, cfg.DKD.T, cfg.DKD.WARMUP
        self.alpha, self.beta = cfg.DKD.ALPHA, cfg.DKD.BETA

    def forward_train(self, image, target, **others):
        student, teacher, _, _ = both(self, image)
        own, count = F.one_hot(target, student.shape[1]).bool(), len(student)
        q, p = (F.softmax(logits / self.temperature, dim=1) for logits in (student, teacher))
        q_own, p_own = q[own], p[own]
        target_part = p_own * (p_own / q_own).log() + (1 - p_own) * ((1 - p_own) / (1 - q_own)).log()
        q_rest, p_rest = ((x[~own].view(count, -1) / self.temperature).log_softmax(1) for x in (student, teacher))
        rest = (p_rest.exp() * (p_rest - q_rest)).sum(1)
        dkd = self.temperature**2 * (self.alpha * target_part + self.beta * rest).mean()
        return student, {
            "loss_ce": self.ce_loss_weight * F.cross_entropy(student, target),
            "loss_kd": min(others["epoch"] / self.warmup, 1.0) * dkd,
        }


class FitNet(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        own = cfg.FITNET
        self.ce_loss_weight, self.feat_loss_weight, self.hint_layer = (
            own.LOSS.CE_WEIGHT,
            own.LOSS.FEAT_WEIGHT,
            own.HINT_LAYER,
        )
        with torch.no_grad():
            features = [model(torch.randn(1, 3, *own.INPUT_SIZE))[1]["feats"] for model in (student, teacher)]
        shapes = [values[self.hint_layer].shape for values in features]
        self.conv_reg = nn.Sequential(nn.Conv2d(shapes[0][1], shapes[1][1], 1), nn.BatchNorm2d(shapes[1][1]), nn.ReLU())

    def get_learnable_parameters(self):
        return super().get_learnable_parameters() + list(self.conv_reg.parameters())

    def forward_train(self, image, target, **others):
        student, _, own, hints = both(self, image)
        error = F.mse_loss(self.conv_reg(own[self.hint_layer]), hints[self.hint_layer])
        return student, {
            "loss_ce": self.ce_loss_weight * F.cross_entropy(student, target),
            "loss_kd": self.feat_loss_weight * error,
        }


CFG = settings(
    DISTILLER={"TYPE": "NONE", "TEACHER": "", "STUDENT": ""},
    SOLVER={"EPOCHS": 240, "LR": 0.05, "WEIGHT_DECAY": 0.0001, "MOMENTUM": 0.9},
    KD={"TEMPERATURE": 4, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}},
    DKD={"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20},
    FITNET={"HINT_LAYER": 2, "INPUT_SIZE": (32, 32), "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 100.0}},
)


def install():
    """Make `import mdistiller` work, unless it does."""
    try:
        import mdistiller.distillers  # noqa: F401
    except ImportError:
        homes = {
            "mdistiller": {},
            "mdistiller.distillers": {"distiller_dict": {"KD": KD, "DKD": DKD, "FITNET": FitNet}},
            "mdistiller.distillers._base": {"Distiller": Distiller},
            "mdistiller.distillers.KD": {"KD": KD},
            "mdistiller.distillers.DKD": {"DKD": DKD},
            "mdistiller.distillers.FitNet": {"FitNet": FitNet},
            "mdistiller.engine": {},
            "mdistiller.engine.cfg": {"CFG": CFG},
        }
        for name, content in homes.items():
            module = sys.modules[name] = types.ModuleType(name)
            module.__dict__.update(content, __path__=[])


def train(distiller, cfg, batches, epochs, optimizer=None):
    """As its base trainer: losses of every step."""
    parameters = distiller.get_learnable_parameters()
    optimizer = optimizer or torch.optim.SGD(
        parameters, lr=cfg.SOLVER.LR, momentum=cfg.SOLVER.MOMENTUM, weight_decay=cfg.SOLVER.WEIGHT_DECAY
    )
    seen = []
    for epoch in epochs:
        distiller.train()
        for image, target in batches:
            optimizer.zero_grad()
            _, losses = distiller(image=image, target=target, epoch=epoch)
            loss = sum(value.mean() for value in losses.values())
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
    return torch.stack(seen)
