"""Each estimator against what is known of made-up gradients."""

import math

import pytest
import torch

from stablekd_fast.diagnose.measures import GradientNoise, cosine, curvature, ratio_of_share, relative_change


def noise_of(gradients) -> GradientNoise:
    measured = GradientNoise()
    for gradient in gradients:
        measured.add([gradient[:2], gradient[2:].reshape(-1, 1)])  # two parameters, as of a block
    return measured


def test_signal_and_noise_of_gaussians_are_unbiased():
    """Over many draws of m = 4: means within four standard errors of |G|^2 and tr C, while |mean|^2 is far off."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5], dtype=torch.float64)
    spread = torch.tensor([1.0, 3.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    found, plain = [], []
    for _ in range(4000):
        gradients = mean + spread * torch.randn(4, 5, generator=generator, dtype=torch.float64)
        measured = noise_of(gradients)
        found.append((measured.signal, measured.noise))
        plain.append(gradients.mean(0).square().sum().item())
    found, truth = torch.tensor(found), torch.tensor([mean.square().sum().item(), spread.square().sum().item()])
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - truth).abs() < 4 * error).all()
    assert torch.tensor(plain).mean() - truth[0] > 20 * error[0], "the average's own noise is what is taken off"


def test_signal_is_the_mean_product_of_pairs():
    gradients = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = gradients @ gradients.T
    pairs = (products.sum() - products.trace()) / 20
    measured = noise_of(gradients)
    assert measured.signal == pytest.approx(pairs.item(), rel=1e-12)
    assert measured.signal_share == pytest.approx((pairs / (products.trace() / 5)).item(), rel=1e-12)


def test_equal_gradients_have_no_noise_and_opposite_ones_no_signal():
    gradient = torch.tensor([1.0, 2.0, -1.0])
    same, opposite = noise_of([gradient] * 3), noise_of([gradient, -gradient])
    assert same.noise == 0 and same.signal_share == 1
    assert opposite.signal < 0 and opposite.signal_share == -1
    with pytest.raises(ValueError, match="at least two"):
        _ = noise_of([gradient]).noise


def test_a_share_is_a_ratio():
    assert ratio_of_share(0.5) == 1 and ratio_of_share(0.75) == 3 and math.isnan(ratio_of_share(1.0))


def test_curvature_of_a_quadratic_is_that_of_its_hessian():
    generator = torch.Generator().manual_seed(2)
    root, weights, move = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 6), 6, 6))
    hessian = root @ root.T

    def gradient(at):
        leaf = at.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(0.5 * leaf @ hessian @ leaf, leaf)
        return [found[:4], found[4:]]

    found = curvature([move[:4], move[4:]], gradient(weights), gradient(weights + move))
    assert found == pytest.approx((move @ hessian @ move / (move @ move)).item(), rel=1e-12)


def test_curvature_of_any_loss_is_its_mean_along_the_move():
    """The loss is sum w^4, whose second derivative along d is 12 w^2 d^2: Simpson's rule is exact for cubics."""
    weights, move = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    at = [(12 * (weights + t * move) ** 2 * move**2).sum() / (move @ move) for t in (0, 0.5, 1)]
    found = curvature([move], [4 * weights**3], [4 * (weights + move) ** 3])
    assert found == pytest.approx(((at[0] + 4 * at[1] + at[2]) / 6).item(), rel=1e-12)


def test_angles_and_changes():
    one, other = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([-4.0]), torch.tensor([3.0])]
    assert cosine(one, other) == 0 and cosine(one, one) == 1
    assert relative_change(other, one) == pytest.approx(2**0.5) and relative_change(one, one) == 0
    assert relative_change(other, one, [torch.tensor([10.0])]) == pytest.approx(50**0.5 / 10)


def test_what_cannot_be_measured_is_not_a_number():
    zero, one = [torch.zeros(2)], [torch.ones(2)]
    assert (
        math.isnan(cosine(zero, one))
        and math.isnan(relative_change(one, zero))
        and math.isnan(curvature(zero, one, one))
    )
