"""Distillers for mdistiller. It is not on PyPI: these tests run against a stand-in of its contract
(`mdistiller_stub.py`), and against the package itself where that can be imported."""

import copy
import importlib.util
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from stablekd_fast.errors import ConfigError

spec = importlib.util.spec_from_file_location("mdistiller_stub", Path(__file__).with_name("mdistiller_stub.py"))
stub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stub)
stub.install()

from mdistiller.distillers import distiller_dict  # noqa: E402
from mdistiller.engine.cfg import CFG  # noqa: E402

from stablekd_fast.blocks import pair_blocks  # noqa: E402
from stablekd_fast.integrations import mdistiller as ours  # noqa: E402

PAIRS = {"FastKD": "KD", "FastDKD": "DKD", "FastFitNet": "FITNET"}
APART, MERGED = [[0], [1], [2], [3]], [[0, 1, 2, 3]]


class Stage(nn.Sequential):
    """Also gives its features before the activation, as the last block of mdistiller's stages does."""

    def forward(self, x):
        before = super().forward(x)
        return before.relu(), before


class Network(nn.Module):
    """In mdistiller's manner: features beside the logits, one by a second use of a layer, and a branch on the image
    size."""

    def __init__(self, small_net, depth: int, seed: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        plain = small_net(depth, seed, widths)
        self.layer1, self.layer2, self.layer3 = (
            Stage(*list(layer)[:-1]) for layer in (plain.layer1, plain.layer2, plain.layer3)
        )
        self.pool, self.fc = plain.pool, plain.fc

    def forward(self, x):
        height = x.shape[2]
        features, before = [], []
        for layer in (self.layer1, self.layer2, self.layer3):
            x, preactivation = layer(x)
            features.append(x)
            before.append(preactivation)
        pooled = self.pool(x) if height < 64 else x.mean((2, 3), keepdim=True)
        pooled = pooled.reshape(x.size(0), -1)
        again = self.layer3[1](features[-1])
        return self.fc(pooled), {
            "feats": [features[0], *features],
            "preact_feats": [*before, again],
            "pooled_feat": pooled,
        }


@pytest.fixture
def networks(small_net, random_batch):
    def build(teacher_widths=(8, 16, 16)):
        teacher, student = Network(small_net, 2, 0, teacher_widths), Network(small_net, 1, 1, (8, 16, 16))
        with torch.no_grad():
            for seed in range(30):
                teacher.train()(random_batch(seed, 32)[0])
        return student, teacher.eval()

    return build


@pytest.fixture
def cfg():
    own = CFG.clone()
    own.merge_from_list(["SOLVER.EPOCHS", 4, "SOLVER.LR", 0.01, "StableKD.SHARE", 0.5, "FITNET.INPUT_SIZE", (8, 8)])
    return own


def test_configs_can_name_the_distillers(cfg):
    assert {"StableKD", *PAIRS} <= distiller_dict.keys()
    cfg.merge_from_list(["DISTILLER.TYPE", "StableKD", "StableKD.LOSS.KD_WEIGHT", 0.2])
    with pytest.raises(AssertionError, match="StableKD.SHAER"):
        cfg.merge_from_list(["StableKD.SHAER", 0.5])


@pytest.mark.parametrize("fast", PAIRS)
def test_fifty_steps_are_those_of_the_distiller_replaced(fast, networks, cfg, random_batch):
    """In float32: roundings are carried on by training."""
    batches, results = [random_batch(seed, 32) for seed in range(10)], []
    for kind in (PAIRS[fast], fast):
        torch.manual_seed(0)
        distiller = distiller_dict[kind](*networks(), cfg)
        losses = stub.train(distiller, cfg, batches, range(1, 6))
        results.append([losses, *distiller.state_dict().values()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", PAIRS)
def test_losses_have_the_names_and_values_of_the_distiller_replaced(fast, networks, cfg, random_batch):
    image, target = random_batch(0)
    torch.manual_seed(0)
    theirs = distiller_dict[PAIRS[fast]](*networks(), cfg).train()
    torch.manual_seed(0)
    own = distiller_dict[fast](*networks(), cfg).train()
    (logits, losses), (expected, reference) = (d(image=image, target=target, epoch=3) for d in (own, theirs))
    assert torch.equal(logits, expected)
    torch.testing.assert_close(losses, reference)
    assert len(own.get_learnable_parameters()) == len(theirs.get_learnable_parameters())


@pytest.mark.parametrize(("epoch", "groups"), [(1, APART), (2, APART), (3, MERGED), (4, MERGED)])
def test_gradients_are_those_of_the_engine(epoch, groups, networks, cfg, random_batch, engine_gradients):
    """Decomposed while the epochs done are less than half of four; the student is narrower, so that bridges are in
    play."""
    student, teacher = (model.double() for model in networks((12, 16, 24)))
    distiller = distiller_dict["StableKD"](student, teacher, cfg).train()
    images, labels = random_batch(0)
    images = images.double()
    before = copy.deepcopy(student.state_dict())
    logits, losses = distiller(image=images, target=labels, epoch=epoch)
    sum(losses.values()).backward()
    got = {f"model.{name}": parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    student.load_state_dict(before)
    expected = engine_gradients(distiller.paired, groups, images, labels)
    assert got.keys() == expected.keys() and logits.shape == (8, 10)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_blocks_are_the_stages_and_compose_to_the_student(networks, cfg, random_batch):
    distiller = distiller_dict["StableKD"](*networks(), cfg).train()
    image, target = random_batch(0)
    distiller(image=image, target=target, epoch=1)
    assert [cut.student for cut in distiller.paired.cuts] == ["model.layer1", "model.layer2", "model.layer3"]
    distiller.eval()
    x = image
    for block in distiller.paired.student_blocks:
        x = block(x)
    assert torch.equal(x, distiller(image=image))


def test_cuts_can_be_named(networks, cfg, random_batch):
    cfg.StableKD.CUTS = ["layer1", ("layer3", "layer3")]
    distiller = distiller_dict["StableKD"](*networks(), cfg).train()
    image, target = random_batch(0)
    distiller(image=image, target=target, epoch=1)
    assert [cut.student for cut in distiller.paired.cuts] == ["model.layer1", "model.layer3"]


def test_a_resumed_run_has_the_bridges_of_the_first(networks, cfg, random_batch):
    """Through a file, as mdistiller keeps checkpoints."""
    batches = [random_batch(seed, 32) for seed in range(4)]
    whole = distiller_dict["StableKD"](*networks((12, 16, 24)), cfg)
    optimizer = torch.optim.SGD(whole.get_learnable_parameters(), lr=0.01)
    stub.train(whole, cfg, batches, [1, 2], optimizer)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = distiller_dict["StableKD"](*networks((12, 16, 24)), cfg)
    resumed.load_state_dict(torch.load(file))
    found = []
    for distiller in (whole, resumed):
        optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.01)
        found.append(stub.train(distiller, cfg, batches[::-1], [2, 3], optimizer))
    assert torch.equal(*found)
    assert any(bridge is not None for bridge in whole.paired.bridges)


def test_nothing_is_added_to_the_student(networks, cfg):
    student, teacher = networks()
    distiller = distiller_dict["StableKD"](student, teacher, cfg)
    assert distiller.get_extra_parameters() == 0
    assert [id(p) for p in distiller.get_learnable_parameters()] == [id(p) for p in student.parameters()]


def test_bad_settings_are_refused(networks, cfg, random_batch):
    image, target = random_batch(0)
    distiller = distiller_dict["StableKD"](*networks(), cfg).train()
    distiller._is_replica = True  # as DataParallel marks its copies
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        distiller(image=image, target=target, epoch=1)
    cfg.merge_from_list(["StableKD.SHARE", 1.5])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        distiller_dict["StableKD"](*networks(), cfg)


def test_networks_whose_logits_come_first_are_cut_without_their_features(networks, random_batch):
    """What is returned beside the logits is no part of any block."""
    student, teacher = networks()
    paired = pair_blocks(ours._Logits(teacher), ours._Logits(student), random_batch(0)[0])
    used = [node.target for block in paired.student_blocks for node in block.graph.nodes if node.op == "call_module"]
    assert len(used) == len(set(used))
