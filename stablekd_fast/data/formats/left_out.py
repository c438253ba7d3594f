"""What lies beside the images of a data set and is not used: counted by reason, and told."""

from __future__ import annotations

from pathlib import Path

from stablekd_fast.errors import printable

_LOOKED_INTO = 200
"""So many files whose names do not say that they are images are opened, to tell what they are."""


class LeftOut:
    """Files and folders that are not used, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}
        """How many there are for a reason, and the first."""
        self._looks = 0

    def add(self, reason: str, path: str | Path, count: int = 1) -> None:
        """Count what is left out for a reason that says what it is, in the plural: `hidden files`."""
        before, first = self._found.get(reason, (0, str(path)))
        self._found[reason] = before + count, first

    def may_look(self) -> bool:
        """Whether one more file may be opened to see what it is."""
        self._looks += 1
        return self._looks <= _LOOKED_INTO

    def counts(self) -> dict[str, int]:
        """How many are left out, by reason."""
        return {reason: count for reason, (count, _) in sorted(self._found.items())}

    def sentence(self) -> str | None:
        """Return what was left out, with an example of each reason; None if nothing was."""
        if not self._found:
            return None
        listed = "; ".join(
            f"{count:,} {reason} (the first: {printable(first)})" for reason, (count, first) in self._found.items()
        )
        return f"Not used: {listed}."
