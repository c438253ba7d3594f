"""A claim and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class NotHere(Exception):
    """There is nothing to check on this machine; the message says why, and what would be needed."""


class Broken(Exception):
    """A claim does not hold; the message says by how much."""


@dataclass(frozen=True)
class Claim:
    """`check` returns what it found on a device, raises `NotHere`, and fails by raising anything else."""

    name: str
    check: Callable[[torch.device], str]

    def row(self, device: torch.device) -> dict[str, str]:
        """Check the claim, whatever may go wrong, and return a row of the self-test."""
        torch.manual_seed(0)
        try:
            result, found = "pass", self.check(device)
        except NotHere as reason:
            result, found = "not here", str(reason)
        except Exception as error:  # whatever it is, the other claims are checked too
            result, found = "fail", (str(error).strip().splitlines() or [""])[0]
            if not isinstance(error, Broken):
                found = f"{type(error).__name__}: {found}"
        return {"claim": self.name, "result": result, "what was found": found}


def difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference between two elements."""
    return max((a.cpu().double() - b.cpu().double()).abs().max().item() for a, b in pairs)
