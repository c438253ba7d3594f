"""Models that map users to scores of all items."""

from __future__ import annotations

from torch import Tensor, nn

from stablekd_fast.errors import ModelError


class MatrixFactorisation(nn.Module):
    """A vector of `width` numbers for each user and each item; a score is the product of two."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Linear(width, items, bias=False)
        nn.init.normal_(self.users.weight, std=0.1)
        nn.init.normal_(self.items.weight, std=0.1)

    def forward(self, users: Tensor) -> Tensor:
        """Map numbers of users int64 `[N]` to scores `[N, items]`."""
        return self.items(self.users(users))


def build_score_model(name: str, items: int, users: int | None) -> nn.Module:
    """Make the model `mf/WIDTH` for so many users and items. Raises ModelError for another name, or without users."""
    kind, _, width = name.partition("/")
    if kind != "mf" or not width.isdecimal() or not int(width):
        raise ModelError(f"There is no model {name!r}; mf/WIDTH is a matrix factorisation, for instance mf/64.")
    if users is None:
        raise ModelError(f"{name} scores items for users, whose number it must know; give interactions as --data.")
    return MatrixFactorisation(users, items, int(width))
