"""Recall and NDCG of lists of 20 items, against loops."""

import math

import torch

from stablekd_fast.data.batch import Batch
from stablekd_fast.data.users import SEEN, TO_BE_FOUND, UNPOPULAR
from stablekd_fast.engine.evaluate import evaluate


def by_loops(scores, labels, kinds):
    recalls, gains = [], []
    for row, wanted in zip(scores.tolist(), labels.tolist()):
        sought = {item for item, kind in enumerate(wanted) if kind in kinds}
        if not sought:
            continue
        open_ = sorted((item for item, kind in enumerate(wanted) if kind != SEEN), key=lambda item: -row[item])[:20]
        recalls.append(len(sought & set(open_)) / len(sought))
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(open_) if item in sought)
        gains.append(gain / sum(1 / math.log2(place + 2) for place in range(min(20, len(sought)))))
    return sum(recalls) / len(recalls), sum(gains) / len(gains)


def test_recall_and_ndcg():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 90, generator=generator)
    kinds = torch.tensor([0, 0, 0, SEEN, SEEN, TO_BE_FOUND, UNPOPULAR], dtype=torch.int8)
    labels = kinds[torch.randint(len(kinds), (40, 90), generator=generator)]
    labels[3][labels[3] == UNPOPULAR] = 0  # a user without unpopular items to be found
    labels[4] = 0
    labels[4, 5] = TO_BE_FOUND
    users = torch.arange(40)
    batches = [Batch(part, -1, part, labels[part]) for part in users.split(16)]
    found = evaluate(lambda images: scores[images], batches, lambda tensor: tensor)
    recall, ndcg = by_loops(scores, labels, (TO_BE_FOUND, UNPOPULAR))
    assert math.isclose(found.ranking.recall, recall) and math.isclose(found.ranking.ndcg, ndcg)
    recall_unpopular, ndcg_unpopular = by_loops(scores, labels, (UNPOPULAR,))
    assert math.isclose(found.ranking.recall_unpopular, recall_unpopular)
    assert math.isclose(found.ranking.ndcg_unpopular, ndcg_unpopular)
    assert (found.accuracy, found.top5, found.images) == (found.ranking.recall, found.ranking.ndcg, 40)
    losses = []
    for row, wanted in zip(scores.double(), labels):
        log_p = row.masked_fill(wanted == SEEN, -torch.inf).log_softmax(0)
        losses.append(-log_p[wanted > 0].mean().item())
    assert math.isclose(found.loss, sum(losses) / 40, rel_tol=1e-9)


def test_fewer_items_than_a_list_has():
    labels = torch.tensor([[TO_BE_FOUND, 0, SEEN]], dtype=torch.int8)
    users = torch.zeros(1, dtype=torch.int64)
    found = evaluate(
        lambda _: torch.tensor([[0.0, 1.0, 9.0]]), [Batch(users, -1, users, labels)], lambda tensor: tensor
    )
    assert found.ranking.recall == 1 and math.isclose(found.ranking.ndcg, 1 / math.log2(3))
    assert found.ranking.recall_unpopular == 0
