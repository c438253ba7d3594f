"""What users had to do with items: read from a file of interactions, or made up."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stablekd_fast.data.users import SEEN, TO_BE_FOUND, UNPOPULAR, UserSplit
from stablekd_fast.data.views import Stream, counter_hash
from stablekd_fast.errors import DataError
from stablekd_fast.objectives.popularity import popularity_groups

LEAST_RATING = 4.0
"""Ratings from 1 to 5 count as an interaction from this one on."""
LEAST_ITEMS = 5
"""Users with fewer items are left out: too little would be left to train on, or to be found."""
VALIDATION, TEST = 0.1, 0.2
"""Shares of each user's items that are held out, and that are to be found in the test."""
GROUPS = 4
"""Groups of items of which the last one, of equally many interactions, is that of the unpopular items."""
MOST_PLACES = 2**29
"""Users times items: a row of all items is kept for each user."""


class Interactions(NamedTuple):
    """Pairs of a user and an item, each once, by number."""

    users: np.ndarray  # int64 [pairs]
    items: np.ndarray  # int64 [pairs]
    names: list[str]  # of the items


class UserSplits(NamedTuple):
    """The splits of a data set of interactions, and how many training interactions each item has."""

    train: UserSplit
    validation: UserSplit
    test: UserSplit
    popularity: Tensor  # int64 [items]


def read_interactions(path: Path) -> Interactions:
    """Read a file whose first line names tab-separated columns, each with its type behind a colon: `user_id:token`,
    `item_id:token`, and perhaps `rating:float`, of which those of `LEAST_RATING` and more count (RecBole's `.inter`).

    Raises DataError for a file without these columns, or with a line that does not fit them.
    """
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    names = [column.partition(":")[0] for column in first.split("\t")]
    for needed in ("user_id", "item_id"):
        if needed not in names:
            raise DataError(
                f"{path} has the columns {', '.join(names)!r}, but {needed} is needed; give a file whose first line "
                "names tab-separated columns, such as user_id:token, item_id:token and rating:float."
            )
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(
                f"Line {number + 2} of {path} has {len(row)} fields, but its first line names {len(names)}."
            )
    users, items = (np.array([row[names.index(name)] for row in rows]) for name in ("user_id", "item_id"))
    kept = np.ones(len(rows), dtype=bool)
    if "rating" in names:
        kept = np.array([_number(row[names.index("rating")], path) for row in rows]) >= LEAST_RATING
    if not kept.any():
        raise DataError(f"{path} has no interaction{' with a rating of 4 or more' if 'rating' in names else ''}.")
    item_names, item_numbers = np.unique(items[kept], return_inverse=True)
    _, user_numbers = np.unique(users[kept], return_inverse=True)
    pairs = np.unique(np.stack([user_numbers, item_numbers], 1), axis=0)
    return Interactions(pairs[:, 0], pairs[:, 1], item_names.tolist())


def made_up(users: int = 600, items: int = 400, seed: int = 0) -> Interactions:
    """Make up interactions: what users like, and what they are shown.

    User u likes item i by a product of eight standard normal factors of each. Items are shown unevenly: the k-th most
    shown one by a power law, k^-1, so that popular items have more interactions than they are liked. Each user has from
    10 to 50 items, drawn without replacement in proportion to exp(liking) times exposure.
    """
    draw = np.random.default_rng(seed)
    liking = 1.5 * draw.normal(size=(users, 8)) @ draw.normal(size=(8, items)) / np.sqrt(8)
    exposure = -np.log1p(draw.permutation(items))
    order = np.argsort(-(liking + exposure + draw.gumbel(size=(users, items))), axis=1)
    counts = draw.integers(10, 51, size=users)
    pairs = [(user, item) for user in range(users) for item in np.sort(order[user, : counts[user]]).tolist()]
    numbers = np.array(pairs, dtype=np.int64)
    return Interactions(numbers[:, 0], numbers[:, 1], [f"item {item}" for item in range(items)])


def divided(found: Interactions) -> UserSplits:
    """Divide the items of each user into those to train on, to hold out and to test; which ones depends on the numbers
    of user and item alone.

    Users with fewer than `LEAST_ITEMS` items train, and are not evaluated. Raises DataError where the table of users
    and items would be too large.
    """
    users, items = int(found.users.max()) + 1, len(found.names)
    if users * items > MOST_PLACES:
        raise DataError(
            f"{users:,} users times {items:,} items are more than {MOST_PLACES:,} places; give fewer users or items."
        )
    keys = counter_hash(Stream.HOLDOUT, 0, found.users, found.items)
    order = np.lexsort((keys, found.users))
    counts = np.bincount(found.users, minlength=users)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    number = counts[found.users[order]]
    enough = number >= LEAST_ITEMS
    tested = enough & (place < np.ceil(number * TEST))
    held_out = enough & ~tested & (place < np.ceil(number * TEST) + np.ceil(number * VALIDATION))
    parts = [_table(found, order[mask], users, items) for mask in (~tested & ~held_out, held_out, tested)]
    train, validation, test = parts
    popularity = train.long().sum(0)
    unpopular = popularity_groups(popularity, GROUPS) == GROUPS - 1
    return UserSplits(
        UserSplit(train, torch.arange(users), users),
        _to_find(validation, train, unpopular),
        _to_find(test, (train + validation).clamp(max=1), unpopular),
        popularity,
    )


def _table(found: Interactions, chosen: np.ndarray, users: int, items: int) -> Tensor:
    table = torch.zeros(users, items, dtype=torch.int8)
    table[torch.from_numpy(found.users[chosen]), torch.from_numpy(found.items[chosen])] = 1
    return table


def _to_find(wanted: Tensor, seen: Tensor, unpopular: Tensor) -> UserSplit:
    """Say of each item what it is to a user; users who have nothing to be found are left out."""
    sought = torch.where(unpopular, UNPOPULAR, TO_BE_FOUND).to(torch.int8)
    table = torch.where(wanted > 0, sought, SEEN * seen)
    users = (wanted > 0).any(1).nonzero().flatten()
    return UserSplit(table[users], users, len(wanted))


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DataError(f"{path} has the rating {text!r}, which is no number.") from error
