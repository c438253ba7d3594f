"""The objectives bpr and unkd: which items they compare."""

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import Facts, StepBatch, objective
from stablekd_fast.objectives.bpr import drawn
from stablekd_fast.objectives.popularity import popularity_groups

ITEMS, USERS = 60, 16


def test_groups_have_equally_many_interactions_and_the_popular_come_first():
    popularity = torch.tensor([1, 50, 2, 10, 10, 20, 3, 4])
    assert popularity_groups(popularity, 2).tolist() == [1, 0, 1, 1, 1, 1, 1, 1]
    assert popularity_groups(popularity, 1).tolist() == [0] * 8
    many = torch.arange(1, 1001)
    groups = popularity_groups(many, 4)
    shares = torch.zeros(4).scatter_add(0, groups, many.float()) / many.sum()
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=2e-3)
    assert groups[-1] == 0 and groups[0] == 3 and (groups.diff() <= 0).all()


def test_items_are_drawn_in_proportion_to_their_mass():
    torch.manual_seed(0)
    mass = torch.tensor([[0.0, 1.0, 3.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    counts = torch.stack([row.bincount(minlength=4) for row in drawn(mass, 40_000)]) / 40_000
    torch.testing.assert_close(counts, mass / mass.sum(1, keepdim=True), rtol=0, atol=0.01)
    assert counts[mass == 0].eq(0).all()


def test_bpr_puts_the_items_of_a_user_above_others():
    scores = torch.tensor([[0.3, -1.2], [2.0, 0.5], [7.0, 9.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # the third user has no item, and counts nothing
    leaf = scores.clone().requires_grad_()
    expected = 0.5 * (F.softplus(leaf[0, 1] - leaf[0, 0]) + F.softplus(leaf[1, 0] - leaf[1, 1]))
    (gradient,) = torch.autograd.grad(expected, leaf)
    loss, own = objective("logits", "bpr", dict(pairs=5))(scores, None, labels)
    torch.testing.assert_close((loss, own), (expected.detach(), gradient))


def test_bpr_says_what_it_needs():
    with pytest.raises(ConfigError, match="bpr ranks the items of users"):
        objective("logits", "bpr")(torch.zeros(2, 3), None, torch.zeros(2, dtype=torch.int64))


def made(popularity=None, **options):
    popularity = torch.arange(ITEMS, 0, -1) if popularity is None else popularity
    device = torch.device("cpu")
    facts = Facts(ITEMS, USERS, USERS, (1, 1), [(ITEMS,)], [(ITEMS,)], [], device, popularity=popularity)
    return objective("auxiliary", "unkd", options).build(facts, 0)


def drawn_gradient(options, times=60, seed=0):
    """The gradient with respect to the scores, added up over many draws, and what the loss was made from."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(USERS, ITEMS, generator=generator)
    labels = (torch.rand(USERS, ITEMS, generator=generator) < 0.2).float()
    scores = torch.randn(USERS, ITEMS, generator=generator).requires_grad_()
    loss, batch = made(**options), StepBatch(torch.arange(USERS), {0: teacher}, labels)
    torch.manual_seed(seed)
    for _ in range(times):
        loss(batch, {0: scores}, None).backward()
    return scores.grad, teacher, labels


def test_pairs_lie_inside_groups_and_leave_the_items_of_a_user_out():
    gradient, teacher, labels = drawn_gradient(dict(groups=3, pairs=30))
    groups = popularity_groups(torch.arange(ITEMS, 0, -1), 3)
    assert gradient[labels > 0].eq(0).all() and gradient[labels == 0].ne(0).float().mean() > 0.9
    for group in range(3):
        inside = gradient[:, groups == group]
        torch.testing.assert_close(inside.sum(1), torch.zeros(USERS), rtol=0, atol=1e-6)  # each pair adds g and -g
        ranked = teacher.masked_fill(labels > 0, -torch.inf)[:, groups == group]
        rows = torch.arange(USERS)
        assert (inside[rows, ranked.argmax(1)] < 0).all()  # the first is above all others: its score is to rise
    crossing = drawn_gradient(dict(groups=1, pairs=30))[0][:, groups == 0].sum(1)
    assert crossing.abs().min() > 1e-3


def test_an_item_is_drawn_less_often_the_lower_the_teacher_ranks_it():
    loss = made(groups=1, pairs=20_000, depth=4.0)
    torch.manual_seed(0)
    ranks = loss._ranks(torch.tensor([10, 1, 0])).flatten(1)
    counts = ranks[0].bincount(minlength=10).double()
    expected = torch.exp(-torch.arange(10) / 4.0).double()
    torch.testing.assert_close(counts / counts.sum(), expected / expected.sum(), rtol=0, atol=0.01)
    assert ranks[0].max() == 9 and ranks[1:].eq(0).all()


def test_the_loss_of_one_pair_that_is_certain():
    """Two items are left in the one group; the teacher ranks the first above the second."""
    labels = torch.ones(1, ITEMS)
    labels[0, [7, 20]] = 0
    teacher, scores = torch.zeros(1, ITEMS), torch.zeros(1, ITEMS)
    teacher[0, 7], scores[0, 7], scores[0, 20] = 1.0, -0.5, 0.75
    loss = made(groups=1, pairs=64, weight=3.0)(StepBatch(torch.zeros(1), {0: teacher}, labels), {0: scores}, None)
    torch.testing.assert_close(loss, 3 * F.softplus(torch.tensor(1.25)))


def test_its_groups_are_in_no_checkpoint():
    assert not made().state_dict() and not list(made().parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pairs=3, groups=4), "pairs=3 was given; each of groups=4"),
        (dict(depth=0.0), "depth=0.0"),
        (dict(groups=0), "groups=0"),
    ],
)
def test_what_cannot_be_is_said(options, message):
    with pytest.raises(ConfigError, match=message):
        made(**options)


def test_a_data_set_of_classes_is_refused():
    facts = Facts(10, 5, 5, (1, 1), [(10,)], [(10,)], [], torch.device("cpu"))
    with pytest.raises(ConfigError, match="this data set has classes and no items"):
        objective("auxiliary", "unkd").build(facts, 0)
