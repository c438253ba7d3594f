"""A claim and what becomes of it."""

from __future__ import annotations

import traceback
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
    """`check` returns what it found on a device, raises `NotHere`, and fails by raising anything else; `how` says in
    a few words what it compares with what."""

    name: str
    check: Callable[[torch.device], str]
    how: str

    def row(self, device: torch.device) -> dict[str, str]:
        """Check the claim, whatever may go wrong, and return a row of the self-test. That of a claim that fails has the
        error's `traceback` too."""
        torch.manual_seed(0)
        row = {"claim": self.name, "how it was checked": self.how}
        try:
            return {**row, "what was found": self.check(device), "result": "pass"}
        except NotHere as reason:
            return {**row, "what was found": str(reason), "result": "not here"}
        except Exception as error:  # whatever it is, the other claims are checked too
            found = (str(error).strip().splitlines() or [""])[0]
            if not isinstance(error, Broken):
                found = f"{type(error).__name__}: {found}"
            return {**row, "what was found": found, "result": "fail", "traceback": traceback.format_exc()}


def difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference between two elements."""
    return max((a.cpu().double() - b.cpu().double()).abs().max().item() for a, b in pairs)
