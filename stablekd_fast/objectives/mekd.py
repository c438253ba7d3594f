"""Distillation from a teacher that only answers: what student and teacher answer is compared as images (Ma et al.,
"Aligning logits generatively for principled black-box knowledge distillation", CVPR 2024: arXiv 2205.10490).

Before the first step, the deprivatization: a generator G learns to make images of codes z that have a place for each
class, against a discriminator D that sees the training images x,

    D: - mean log D(x) - mean log(1 - D(G(z)))
    G: - mean log D(G(z)) - answer_weight * mean of max over classes of T(G(z)) * log D(G(z)),

where T is what the teacher answers, probabilities or labels: images count for more that it is sure of. G is then
frozen, and the student learns by

    weight * mean |G(S / temperature) - G(T / temperature)|  +  the loss at the head, KL(T || S).

The mean is over images, channels and pixels. Labels are used by neither.

The formulas were taken from summaries of the paper, and its code was not read. So these are choices of this project:
codes are probabilities, as answers are, the softmax of noise that has `spread`; S / temperature is the softmax of
logits that were divided; G learns by - log D(G(z)), which has the fixed point of log(1 - D(G(z))); the student sees the
training images, where the paper's sees those of G; weights, layers and lengths. The paper's accuracies were not
reproduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast.errors import TrainingError, check_range
from stablekd_fast.objectives.auxiliary import Auxiliary, Facts, Network, StepBatch
from stablekd_fast.objectives.generators import Discriminator, ImageGenerator, Normalise, frozen
from stablekd_fast.objectives.methods import Method, add_method
from stablekd_fast.objectives.registry import register


@dataclass(frozen=True)
class MEKD:
    """The distance of images that a generator makes of the student's and of the teacher's answers."""

    weight: float = 1.0
    """Weight of the distance of images."""
    temperature: float = 1.0
    """What logits are divided by before the generator makes images of them."""
    steps: int = 1000
    """Steps, of a batch each, in which the generator learns before the student does."""
    lr: float = 2e-4
    """The learning rate of generator and discriminator."""
    answer_weight: float = 0.1
    """Weight of the part of the generator's loss that counts by what the teacher answers; 0 asks it nothing then."""
    spread: float = 3.0
    """The standard deviation of the noise that codes are the softmax of."""
    width: int = 32
    """Channels of the generator's last map and of the discriminator's first."""

    def __post_init__(self) -> None:
        check_range(self, "weight", "temperature", "steps", "lr", "spread", "width", above=0)
        check_range(self, "answer_weight", least=0)


@register("auxiliary", "mekd", MEKD)
class MappingEmulation(Auxiliary):
    """The generator lies in buffers: the student's optimizer leaves it alone, and checkpoints have it."""

    learns = True
    learned: Tensor

    def __init__(self, config: MEKD, facts: Facts) -> None:
        super().__init__(config, facts)
        self.head = facts.cuts
        generator = ImageGenerator(facts.classes, facts.size, config.width, remember=True)
        self.learnable = [name for name, _ in generator.named_parameters()]
        self.generator = frozen(generator).eval()
        self.normalise = Normalise(facts.mean, facts.std)
        self.register_buffer("learned", torch.tensor(False))
        self.seed = int(torch.randint(2**31, ()))

    @classmethod
    def teacher_outputs(cls, config: MEKD, cuts: int) -> set[int]:
        return {cuts}

    def learn(self, batches: Iterator[Tensor], teacher: Callable[[Tensor], Tensor]) -> None:
        """Let the generator learn, if it has not yet."""
        if self.learned:
            return
        config, device, gpus = self.config, self.facts.device, [self.facts.device] * (self.facts.device.type == "cuda")
        with torch.random.fork_rng(devices=gpus), torch.enable_grad():
            torch.manual_seed(self.seed)
            judge = Discriminator(config.width).to(device)
            weights = [self.generator.get_buffer(name).requires_grad_() for name in self.learnable]
            ours, theirs = (torch.optim.Adam(p, config.lr, (0.5, 0.999)) for p in (weights, judge.parameters()))
            self.generator.train()
            loss = torch.zeros(())
            for _ in range(config.steps):
                loss = self._learn_from(next(batches), judge, teacher, ours, theirs)
            self.generator.eval()
            for weight in weights:
                weight.requires_grad_(False)
        if not loss.isfinite():
            raise TrainingError(
                f"The loss of mekd's generator is not finite after {config.steps} steps; lower --auxiliary-options.lr."
            )
        self.learned.fill_(True)

    def forward(self, batch: StepBatch, student: dict[int, Tensor], network: Network) -> Tensor:
        with torch.no_grad():
            theirs = self.generator(self._codes(batch.targets[self.head]))
        ours = self.generator(self._codes(student[self.head]))
        return self.config.weight * (ours - theirs).abs().mean()

    def _codes(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.config.temperature).softmax(1)

    def _learn_from(
        self,
        real: Tensor,
        judge: nn.Module,
        teacher: Callable[[Tensor], Tensor],
        ours: torch.optim.Optimizer,
        theirs: torch.optim.Optimizer,
    ) -> Tensor:
        """Take a step of both networks with images `[N, 3, H, W]`; return the generator's loss, 0-dim."""
        codes = (self.config.spread * torch.randn(len(real), self.facts.classes, device=real.device)).softmax(1)
        made = self.normalise(self.generator(codes))
        theirs.zero_grad()
        judge_loss(judge(real.float()), judge(made.detach())).backward()
        theirs.step()
        sure = None
        if self.config.answer_weight:
            sure = teacher(made.detach()).float().softmax(1).amax(1)
        loss = generator_loss(judge(made), sure, self.config.answer_weight)
        ours.zero_grad()
        loss.backward()
        ours.step()
        return loss.detach()


def judge_loss(real: Tensor, made: Tensor) -> Tensor:
    """Return the discriminator's loss from its logits `[N]` on real and on made images, 0-dim."""
    return F.softplus(-real).mean() + F.softplus(made).mean()


def generator_loss(made: Tensor, sure: Tensor | None, answer_weight: float) -> Tensor:
    """Return the generator's loss from the discriminator's logits `[N]` on its images, and the teacher's highest
    probability `[N]` for each, 0-dim."""
    each = F.softplus(-made)  # - log D
    return each.mean() if sure is None else ((1 + answer_weight * sure) * each).mean()


add_method(
    "mekd",
    Method(
        auxiliary="mekd",
        options={"logits": {"temperature": 1.0, "kl_weight": 1.0, "ce_weight": 0.0}},
    ),
)
