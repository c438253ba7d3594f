"""Training images that are made between steps, from what teacher and student answer."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.blocks.modes import evaluation_mode
from stablekd_fast.data.bank import Bank
from stablekd_fast.data.views import Stream, counter_hash
from stablekd_fast.errors import TrainingError
from stablekd_fast.models.outputs import LogitsOf
from stablekd_fast.objectives import Synthesis
from stablekd_fast.objectives.synthesis import Rounds

_BANK, _MAKER = "bank", "maker"


class SynthesisedImages:
    """Has `synthesis` make images for `bank` when they are due. What a round makes follows from `seed`, from the state,
    and from the networks' weights; so a resumed run goes on with the same bits."""

    def __init__(self, synthesis: Synthesis, bank: Bank, rounds: Rounds, paired: PairedBlocks, seed: int) -> None:
        self.synthesis, self.bank, self.rounds, self.seed = synthesis, bank, rounds, seed
        self.teacher, self.student = nn.Sequential(*paired.teacher_blocks), LogitsOf(paired.student)
        self.done = 0
        """Rounds so far."""

    def before_step(self, step: int) -> None:
        """Make the images that are due before a step of the run: those of the warm-up before the first one, and a round
        more before each that is a multiple of `every`."""
        while self.done < self.rounds.warm_up + 1 + step // self.rounds.every:
            self._round()

    def _round(self) -> None:
        random = torch.Generator(self.bank.images.device)
        random.manual_seed(int(counter_hash(Stream.SYNTHESIS, self.seed, self.done)[0] >> 1))
        with evaluation_mode(self.teacher), evaluation_mode(self.student), _frozen(self.teacher, self.student):
            images, classes = self.synthesis.make(self.teacher, self.student, random)
        if not images.isfinite().all():
            raise TrainingError(
                f"The images of round {self.done + 1} are not finite. Training stopped; lower the learning rates of "
                "--synthesis-options."
            )
        self.bank.put(images, classes)
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """Return the bank, what makes its images, and the number of rounds, by name."""
        parts = ((_BANK, self.bank), (_MAKER, self.synthesis))
        found = {f"{head}/{name}": value for head, part in parts for name, value in part.state().items()}
        return {**found, "done": torch.tensor(self.done)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for head, part in ((_BANK, self.bank), (_MAKER, self.synthesis)):
            part.restore({n.removeprefix(f"{head}/"): v for n, v in state.items() if n.startswith(f"{head}/")})
        self.done = int(state["done"])


@contextlib.contextmanager
def _frozen(*networks: nn.Module):
    """A context in which the networks' parameters need no gradients, which saves half of a backward pass."""
    changed = [p for network in networks for p in network.parameters() if p.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
