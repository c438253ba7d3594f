"""The alignment of a student without a classifier with its teacher, against numpy."""

import dataclasses

import numpy as np
import pytest
import torch

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import Batch
from stablekd_fast.engine.alignment import aligned, compared
from stablekd_fast.errors import DataError
from stablekd_fast.models.headless import named_network
from stablekd_fast.run.builders import auxiliary_facts, embedding_layouts


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(7, 3, 8, 8)


@pytest.fixture
def paired(images):
    teacher, student = (named_network(name, 10, 8, "embedding").eval() for name in ("resnet8", "resnet20_half"))
    return pair_blocks(teacher, student, images)


def batches(images):
    """In two, of unlike sizes: means are over images, not over batches."""
    return [Batch(torch.arange(len(part)), 0, part, torch.zeros(len(part))) for part in images.split(5)]


def expected(own, theirs):
    own, theirs = (x.detach().double().numpy() for x in (own, theirs))
    lengths = np.linalg.norm(own, axis=1), np.linalg.norm(theirs, axis=1)
    cosines = (own * theirs).sum(1) / lengths[0] / lengths[1]
    return [cosines.mean(), (np.linalg.norm(own - theirs, axis=1) / lengths[1]).mean()]


def test_embeddings_are_compared_behind_the_projector(paired, images):
    paired = dataclasses.replace(paired, head="embedding")
    layouts = embedding_layouts(paired, images)
    facts = auxiliary_facts(paired, 10, 7, 7, (8, 8), torch.device("cpu"), outputs=layouts)
    assert (facts.student_shapes[-1], facts.teacher_shapes[-1]) == ((32,), (64,))
    objectives = objectives_of(DistillConfig(head="embedding")).made(facts, 0)
    found = aligned(compared(paired, objectives, paired.student), batches(images), lambda x: x)
    projected = objectives.module.projector(paired.student(images))
    assert [found.cosine, found.relative_error] == pytest.approx(expected(projected, paired.teacher(images)), rel=1e-5)
    assert found.images == 7 and found.finite


def test_without_a_head_the_teacher_s_features_go_through_the_student_s_end(paired, images):
    paired = dataclasses.replace(paired, head="none")
    objectives = objectives_of(DistillConfig(head="none"))
    found = aligned(compared(paired, objectives, paired.student), batches(images), lambda x: x)
    features = paired.bridges[-1](torch.nn.Sequential(*paired.teacher_blocks[:-1])(images))
    pooled = features.mean((2, 3))
    assert [found.cosine, found.relative_error] == pytest.approx(expected(paired.student(images), pooled), rel=1e-4)
    doubled = aligned(lambda x: (x.flatten(1), 2 * x.flatten(1)), batches(images), lambda x: x, lambda sums: 2 * sums)
    assert (doubled.cosine, doubled.relative_error, doubled.images) == (pytest.approx(1), pytest.approx(0.5), 14)


def test_widths_that_nothing_maps_are_compared_by_the_relations_of_a_batch(images):
    teacher, student = (named_network(name, 10, 8, "embedding").eval() for name in ("resnet8", "resnet20_half"))
    paired = dataclasses.replace(pair_blocks(teacher, student, images, bridge="none"), head="none")
    pair = compared(paired, objectives_of(DistillConfig(head="none", method="fitnet")), student)
    own, theirs = pair(images)
    unit = torch.nn.functional.normalize(student(images), dim=1)
    torch.testing.assert_close(own, unit @ unit.T)
    assert theirs.shape == (7, 7) and torch.allclose(theirs.diagonal(), torch.ones(7))


def test_what_cannot_be_measured_is_said(images):
    with pytest.raises(DataError, match="can be read"):
        aligned(lambda x: (x, x), [], lambda x: x)
    broken = aligned(lambda x: (x.flatten(1), x.flatten(1) * torch.nan), batches(images), lambda x: x)
    assert not broken.finite
