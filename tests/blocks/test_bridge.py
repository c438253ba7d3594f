import pytest
import torch

from stablekd_fast.blocks import Bridge, fit_bridge
from stablekd_fast.errors import ConfigError


@pytest.fixture
def activation():
    """`[64, 6, 4, 4]`, non-negative as after ReLU; channels 3 to 5 are scaled copies of 0 to 2."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(64, 3, 4, 4, generator=generator)
    return torch.cat([base, 0.5 * base], 1)


def test_select_keeps_the_channels_that_explain_the_others(activation):
    bridge = fit_bridge("select", activation, 3, 1, 1)
    assert torch.equal(bridge(activation), activation[:, :3])


def test_average_is_non_negative_and_uses_every_channel(activation):
    bridge = fit_bridge("average", activation, 3, 1, 1)
    assert (bridge.weight >= 0).all()
    assert torch.allclose(bridge.weight.sum(1), torch.ones(3))
    assert torch.allclose(bridge(activation), 0.75 * activation[:, :3])


def test_pca_keeps_the_most_power(activation):
    noisy = activation + 0.01 * torch.rand(activation.shape, generator=torch.Generator().manual_seed(1))
    weight = fit_bridge("pca", noisy, 3, 1, 1).weight
    assert torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-5)
    flat = noisy.movedim(1, -1).flatten(0, -2)
    kept = (flat @ weight.T).pow(2).sum() / flat.pow(2).sum()
    singular = torch.linalg.svdvals(flat).pow(2)
    assert torch.allclose(kept, singular[:3].sum() / singular.sum(), atol=1e-5)


def test_a_wider_student_repeats_the_teacher(activation):
    bridge = fit_bridge("pca", activation, 8, 1, 1)
    assert bridge.kind == "repeat"
    assert torch.equal(bridge(activation), activation[:, [0, 1, 2, 3, 4, 5, 0, 1]])


def test_layouts_are_converted():
    channels_last = torch.arange(2 * 4 * 4 * 6.0).view(2, 4, 4, 6)
    assert torch.equal(Bridge(None, -1, 1)(channels_last), channels_last.permute(0, 3, 1, 2))
    bridge = fit_bridge("select", channels_last, 6, -1, 1)
    assert bridge.weight is None


def test_an_unknown_kind_is_refused(activation):
    with pytest.raises(ConfigError, match="select, average, pca"):
        fit_bridge("magic", activation, 3, 1, 1)


def test_channels_are_on_axis_1_unless_said():
    weight = torch.randn(2, 3)
    x = torch.randn(4, 3, 5, 6)
    torch.testing.assert_close(Bridge(weight)(x), torch.einsum("sc,nchw->nshw", weight, x))
