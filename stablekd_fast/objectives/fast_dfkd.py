"""Distillation without data, from images of a generator that learns to make the next ones quickly (Fang et al., "Up to
100x faster data-free knowledge distillation", AAAI 2022: arXiv 2112.06253).

A round draws codes z and classes y, copies the generator G, and takes `steps` steps of Adam on copy and codes. With the
views x of G(z) that the student would get, the loss is

    bn_weight * sum over the teacher's batch norms of |var(x) - running var| + |mean(x) - running mean|
    + one_hot_weight * CE(teacher(x), y)
    - adversarial_weight * mean of KL(teacher(x) || student(x)), which is 0 for images on which they disagree.

Norms are Euclidean; mean and variance of a batch are averaged with those of earlier rounds by `bn_momentum`. G itself
then takes one step of Adam, along the sum of the copy's gradients (`first-order`), or towards the copy (`reptile`). The
images of the step with the smallest loss go into the bank, as bytes. The adversarial loss rests in the warm-up.

Formula and weights are those of the authors' public code (zju-vipa/Fast-Datafree, script for CIFAR-100 with wide
networks, five steps). The paper's own accuracies were not reproduced. The script makes the generator's first layer anew
once in a run, which is left out here; the student's learning rate is the setting of the run.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.errors import ConfigError, check_range
from stablekd_fast.objectives.generators import ImageGenerator, Normalise
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register
from stablekd_fast.objectives.synthesis import Network, Rounds, SynthesisFacts

_BETAS = (0.5, 0.999)
"""Adam's, for generator, copy and codes."""

Moments = list[tuple[Tensor, Tensor]]
"""Mean and variance `[C]` at each batch norm."""


@dataclass(frozen=True)
class FastDFKD(Rounds):
    """A generator whose copy is fitted to the teacher in few steps, and which learns from its copies."""

    steps: int = 5
    """Steps of the copy in each round."""
    lr: float = 3e-3
    """The learning rate of the copy; the generator's is `steps` times as large."""
    lr_codes: float = 0.01
    """The learning rate of the codes."""
    bn_weight: float = 10.0
    """Weight of the distance from the statistics of the teacher's batch norms."""
    bn_momentum: float = 0.9
    """How much of a batch's statistics is taken from earlier rounds."""
    one_hot_weight: float = 0.4
    """Weight of the teacher's cross entropy with the classes that were drawn."""
    adversarial_weight: float = 1.1
    """Weight of the divergence of student and teacher, which images are to enlarge."""
    meta: Literal["first-order", "reptile"] = "first-order"
    """Along what the generator learns from its copies: their gradients, or where they have gone."""
    latent: int = 256
    """Numbers of a code."""
    width: int = 64
    """Channels of the generator's last map; the maps before it have twice as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "steps", "lr", "latent", "width", above=0)
        check_range(self, "lr_codes", "bn_weight", "one_hot_weight", "adversarial_weight", "bn_momentum", least=0)
        if self.bn_momentum >= 1:
            raise ConfigError(f"bn_momentum={self.bn_momentum} was given; it must be less than 1.")
        if self.meta not in ("first-order", "reptile"):
            raise ConfigError(f"meta={self.meta!r} was given; choose first-order or reptile.")


@register("synthesis", "fast-dfkd", FastDFKD)
class FastImages:
    """Generator, its optimizer, and the statistics of earlier rounds."""

    def __init__(self, config: FastDFKD, facts: SynthesisFacts) -> None:
        self.config, self.facts = config, facts
        if config.bn_weight and not facts.norms:
            raise ConfigError(
                "fast-dfkd compares images with the statistics of the teacher's batch norms, but the teacher has none; "
                "give --synthesis-options.bn-weight=0, or a teacher with batch norms."
            )
        self.generator = ImageGenerator(config.latent, facts.size, config.width).to(facts.device)
        self.normalise = Normalise(facts.mean, facts.std).to(facts.device)
        self.meta = torch.optim.Adam(self.generator.parameters(), config.lr * config.steps, _BETAS)
        self.wanted, self.kept = running_moments(facts.norms), list[tuple[Tensor, Tensor]]()
        self.rounds = 0

    def make(self, teacher: Network, student: Network, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Make the images of a round, `[images, 3, H, W]`, and their classes; see `Synthesis`."""
        config, device = self.config, self.facts.device
        codes = torch.randn(config.images, config.latent, generator=random, device=device).requires_grad_()
        classes = torch.randint(self.facts.classes, (config.images,), generator=random, device=device)
        fitted = copy.deepcopy(self.generator)
        learned = [*fitted.parameters(), codes]
        groups = [{"params": learned[:-1]}, {"params": [codes], "lr": config.lr_codes}]
        optimizer = torch.optim.Adam(groups, config.lr, _BETAS)
        adversary = student if self.rounds >= config.warm_up and config.adversarial_weight else None
        best, least, moments = torch.empty(0), float("inf"), []
        for parameter in self.generator.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(config.steps):
            images = fitted(codes)
            with norm_inputs(self.facts.norms if config.bn_weight else []) as found:
                loss = self._loss(self._views(images, random), classes, teacher, adversary, found)
            moments = found
            if not len(best) or loss.item() < least:
                best, least = images.detach(), loss.item()
            for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned)):
                parameter.grad = gradient
            self._learn(fitted)
            optimizer.step()
        self._step(fitted)
        self.kept = averaged([(mean.detach(), var.detach()) for mean, var in moments], self.kept, config.bn_momentum)
        self.rounds += 1
        return best, classes

    def state(self) -> dict[str, Tensor]:
        """Weights of the generator, moments of its optimizer, statistics of earlier rounds, and their number."""
        found = {f"generator/{name}": value for name, value in self.generator.state_dict().items()}
        for name, parameter in self.generator.named_parameters():
            found |= {f"adam/{name}/{key}": value for key, value in self.meta.state[parameter].items()}
        for number, (mean, var) in enumerate(self.kept):
            found |= {f"mean/{number}": mean, f"var/{number}": var}
        return {**found, "rounds": torch.tensor(self.rounds)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        device, head = self.facts.device, "generator/"
        own = {name.removeprefix(head): value for name, value in state.items() if name.startswith(head)}
        self.generator.load_state_dict(own)
        for name, parameter in self.generator.named_parameters():
            keys = {key: state.get(f"adam/{name}/{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            self.meta.state[parameter] = {
                key: value.clone() if key == "step" else value.to(device, copy=True)
                for key, value in keys.items()
                if value is not None
            }
        count = sum(name.startswith("mean/") for name in state)
        self.kept = [(state[f"mean/{k}"].to(device), state[f"var/{k}"].to(device)) for k in range(count)]
        self.rounds = int(state["rounds"])

    def _loss(
        self, views: Tensor, classes: Tensor, teacher: Network, student: Network | None, found: Moments
    ) -> Tensor:
        """Return the loss of views `[N, 3, H, W]`. The teacher's pass fills `found`."""
        config, logits = self.config, teacher(views)
        loss = config.one_hot_weight * F.cross_entropy(logits, classes)
        if config.bn_weight:
            found = averaged(found, self.kept, config.bn_momentum)
            loss = loss + config.bn_weight * statistics_distance(found, self.wanted)
        if student is not None:
            loss = loss - config.adversarial_weight * agreeing_divergence(student(views), logits)
        return loss

    def _views(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Shift and mirror images `[N, 3, H, W]` as the student's views are, and normalise them."""
        count, (height, width), padding = len(images), images.shape[2:], self.facts.padding
        device, drawn = images.device, {"generator": random, "device": images.device}
        top, left = torch.randint(2 * padding + 1, (2, count, 1), **drawn)
        rows, columns = (start + torch.arange(side, device=device) for start, side in ((top, height), (left, width)))
        mirrored = (torch.rand(count, 1, **drawn) < 0.5) & self.facts.flip
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded, places = F.pad(images, [padding] * 4), torch.arange(count, device=device)
        views = padded[places.view(-1, 1, 1), :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, 3]
        return self.normalise(views.permute(0, 3, 1, 2).contiguous())

    def _learn(self, fitted: nn.Module) -> None:
        """Add the copy's gradients to those of the generator."""
        if self.config.meta == "first-order":
            for own, other in zip(self.generator.parameters(), fitted.parameters()):
                assert own.grad is not None and other.grad is not None
                own.grad += other.grad

    def _step(self, fitted: nn.Module) -> None:
        """Let the generator learn from its copy."""
        if self.config.meta == "reptile":
            for own, other in zip(self.generator.parameters(), fitted.parameters()):
                own.grad = (own - other).detach()
        self.meta.step()
        self.meta.zero_grad()


@contextlib.contextmanager
def norm_inputs(norms: list[nn.Module]) -> Iterator[Moments]:
    """A context in which the list that it gives is filled with mean and variance `[C]` of what goes into each norm, in
    the order of their calls; a norm that is called again begins nothing anew: its last call counts."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    moments: Moments = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        found[id(norm)] = (values.mean(1), values.var(1, correction=0))
        moments[:] = [found[id(one)] for one in norms if id(one) in found]

    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def averaged(found: Moments, kept: Moments, momentum: float) -> Moments:
    """Return moments averaged with those of earlier rounds, if there are any."""
    if not kept:
        return found
    return [
        (momentum * old_mean + (1 - momentum) * mean, momentum * old_var + (1 - momentum) * var)
        for (mean, var), (old_mean, old_var) in zip(found, kept)
    ]


def running_moments(norms: list[nn.Module]) -> Moments:
    """Return what batch norms remember, as it is."""
    return [(norm.get_buffer("running_mean"), norm.get_buffer("running_var")) for norm in norms]


def statistics_distance(found: Moments, wanted: Moments) -> Tensor:
    """Return the sum over norms of the Euclidean distances of mean and variance from those wanted, 0-dim."""
    pairs = [(own, other) for both in zip(found, wanted) for own, other in zip(*both)]
    return torch.stack([torch.linalg.vector_norm(own - other) for own, other in pairs]).sum()


def agreeing_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits `[N, classes]`, 0 for images on which they disagree, as a mean over all
    images, 0-dim."""
    agree = student.argmax(1) == teacher.argmax(1)
    each = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    return (each * agree).mean()


add_method(
    "fast-dfkd",
    Method(
        synthesis="fast-dfkd",
        options={"logits": {"temperature": 20.0, "kl_weight": 1.0, "ce_weight": 0.0}},
    ),
)
