"""Where vectors end, where numbers are tiny, and what lies beside an output."""

import pytest
import torch
from torch.nn import functional as F

from stablekd_fast import kernels

WIDTHS = [1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 1001]
"""On both sides of every vector's width."""


def rows(width, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(4, width, generator=generator) + shift


@pytest.mark.parametrize("temperature", [1.0, 4.0, 3.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_logits_far_below_zero_lose_nothing(width, temperature):
    """What pads the last vector must not be the largest logit, nor count as a class."""
    student, teacher, labels = rows(width, 1, -200.0), rows(width, 2, -190.0), torch.arange(4) % width
    exact = student.double().requires_grad_()
    log_q, p = torch.log_softmax(exact / temperature, 1), torch.softmax(teacher.double() / temperature, 1)
    divergence = temperature**2 * (p * (p.log() - log_q)).sum(1).mean()
    expected = 0.6 * divergence + 0.4 * F.cross_entropy(exact, labels)
    (gradient,) = torch.autograd.grad(expected, exact)
    loss, own = kernels.kd_loss_with_grad(student, teacher, labels, temperature=temperature, alpha=0.6)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(own.double(), gradient, rtol=1e-3, atol=1e-5)
    probabilities, indices = p.topk(width)  # a cached teacher that has kept all of them
    kept, own = kernels.kd_loss_with_grad(
        student, (indices, probabilities.float()), labels, temperature=temperature, alpha=0.6
    )
    torch.testing.assert_close(kept.double(), expected.detach(), rtol=1e-4, atol=5e-4)
    torch.testing.assert_close(own.double(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [w for w in WIDTHS if w > 1])
def test_decoupled_losses_far_below_zero_lose_nothing(width):
    student, teacher, labels = rows(width, 1), rows(width, 2), torch.arange(4) % width
    near = kernels.decoupled_kl_with_grad(student, teacher, labels)
    far = kernels.decoupled_kl_with_grad(student - 200, teacher - 190, labels)
    torch.testing.assert_close(far[0], near[0], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(far[1], near[1], rtol=1e-2, atol=1e-3)


def maps(scale, seed, channels=5):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, channels, 3, 3, generator=generator)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [1e-7, 3e-7, 1e-6, 1e-4])
def test_tiny_features_are_compared_as_documented(scale, layout):
    """Squared lengths are those plus 1e-12, variances plus 1e-5, powers at least 1e-12."""
    student, target = (maps(scale, seed).to(memory_format=layout) for seed in (1, 2))
    x, y = student.double(), target.double()

    def units(maps, axes):
        return maps / (maps.square().sum(axes, keepdim=True) + 1e-12).sqrt()

    def close(own, expected):
        torch.testing.assert_close(own.double(), expected, rtol=2e-4, atol=0)

    close(
        kernels.feature_mse(student, target, normalize="power"),
        (x - y).square().mean() / y.square().mean().clamp(1e-12),
    )
    close(
        kernels.feature_mse(student, target, normalize="l2"),
        (units(x, (1, 2, 3)) - units(y, (1, 2, 3))).square().sum() / 2,
    )
    variance = y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    close(kernels.feature_mse(student, target, normalize="channel"), ((x - y).square() / variance).mean())
    for per, axes in (("position", (1,)), ("sample", (1, 2, 3))):
        expected = 1 - (units(x, axes) * units(y, axes)).sum(axes)
        close(kernels.feature_cosine(student, target, per=per), expected.mean())


def test_a_target_of_zeros_is_compared_as_documented():
    student, zeros = maps(1e-6, 1), torch.zeros(2, 5, 3, 3)
    expected = student.double().square().mean() / 1e-12
    torch.testing.assert_close(
        kernels.feature_mse(student, zeros, normalize="power").double(), expected, rtol=1e-4, atol=0
    )


class Guarded:
    """From here on new tensors lie between canaries, which `check` looks after."""

    CANARY, WIDTH = 77, 64

    def __init__(self, monkeypatch):
        self.made = []
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, self.between(getattr(torch, name)))

    def between(self, original):
        def empty(*arguments, **options):
            out = original(*arguments, **options)
            if out.numel() == 0 or out.device.type != "cpu":
                return out
            room = original_empty(out.numel() + 2 * self.WIDTH, dtype=out.dtype)
            room.view(torch.uint8).fill_(self.CANARY)
            self.made.append((room, out.numel()))
            return room.as_strided(out.shape, out.stride(), self.WIDTH)

        return empty

    def check(self):
        assert self.made, "nothing was allocated"
        for room, count in self.made:
            for beside in (room[: self.WIDTH], room[self.WIDTH + count :]):
                assert beside.view(torch.uint8).eq(self.CANARY).all(), "something was written beside an output"


original_empty = torch.empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 2, 3, 17])
def test_nothing_is_written_beside_an_output(width, dtype, monkeypatch):
    student, teacher = rows(width, 1).to(dtype), rows(width, 2).to(dtype)
    labels = torch.arange(4) % width
    features = [
        (maps(1.0, seed, width)[:, :, :, :count].contiguous(memory_format=layout).to(dtype))
        for seed in (1, 2)
        for count in (1, 2, 3)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    images = torch.randint(0, 256, (3, width, width, 3), dtype=torch.uint8)
    chosen, offsets, flips = torch.tensor([2, 0]), torch.tensor([[0, 4], [3, 1]]), torch.tensor([True, False])
    guarded = Guarded(monkeypatch)
    kernels.kd_loss_with_grad(student, teacher, labels, temperature=2.0, alpha=0.5)
    if width > 1:
        kernels.decoupled_kl_with_grad(student, teacher, labels)
    kernels.grouped_kl_with_grad(student, teacher)
    kernels.correlation_with_grad(student, teacher)
    kernels.standardised_kd_loss_with_grad(student, teacher, labels)
    for one, other in zip(features[:6], features[6:]):
        for normalize in (None, "power", "channel", "l2"):
            kernels.feature_mse_with_grad(one, other, normalize=normalize)
        for per in ("position", "sample"):
            kernels.feature_cosine_with_grad(one, other, per=per)
        kernels.attention_transfer_with_grad(one, other)
    for channels_last in (True, False):
        kernels.augment_batch(
            images, chosen, offsets, flips, padding=2, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), dtype=dtype,
            channels_last=channels_last,
        )  # fmt: skip
    guarded.check()


@pytest.mark.parametrize("width", [6, 17, 1001])
def test_label_smoothing_is_shared_by_the_classes_that_take_part(width):
    """A class that is -inf for student and teacher is masked: it takes no share of the smoothing."""
    student, teacher, labels = rows(width, 1), rows(width, 2), torch.zeros(4, dtype=torch.int64)
    masked = torch.arange(width) % 3 == 2
    student[:, masked], teacher[:, masked] = -torch.inf, -torch.inf
    loss, own = kernels.kd_loss_with_grad(student, teacher, labels, temperature=2.0, alpha=0.4, label_smoothing=0.3)
    exact, target = student[:, ~masked].double().requires_grad_(), teacher[:, ~masked].double()
    log_q, p = torch.log_softmax(exact / 2, 1), torch.softmax(target / 2, 1)
    expected = 0.4 * 4 * (p * (p.log() - log_q)).sum(1).mean()
    expected = expected + 0.6 * F.cross_entropy(exact, labels, label_smoothing=0.3)
    (gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own[:, ~masked].double(), gradient, rtol=1e-4, atol=1e-6)
    assert own[:, masked].eq(0).all()


@pytest.mark.parametrize("width", [1023, 1024, 1025, 2048, 3000])
def test_long_rows_are_added_up_once(width):
    """Each block of a long row begins with its largest exponentials: one that counted twice would be seen."""
    student, teacher = torch.zeros(2, width), torch.zeros(2, width)
    student[:, ::1024], teacher[:, ::1024] = 6.0, 7.0
    p, log_q = torch.softmax(teacher.double(), 1), torch.log_softmax(student.double(), 1)
    expected = (p * (p.log() - log_q)).sum(1).mean()
    got, own = kernels.kd_loss_with_grad(student, teacher, temperature=1.0, alpha=1.0)
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=0)
    torch.testing.assert_close(own.double(), (log_q.exp() - p) / 2, rtol=1e-4, atol=1e-8)


def test_a_large_gradient_need_not_be_aligned():
    """Past the caches only whole, aligned vectors can be written; rows of 1,027 elements begin anywhere."""
    student, teacher = torch.randn(4200, 1027), torch.randn(4200, 1027)
    _, own = kernels.kd_loss_with_grad(student, teacher, temperature=2.0, alpha=1.0)
    expected = 2 * (torch.softmax(student / 2, 1) - torch.softmax(teacher / 2, 1)) / len(student)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-8)


def test_codes_reach_from_minus_127_to_127():
    """The scale of numbers below 2^-126 is a whole multiple of 2^-149, and may be too small for the largest."""
    smallest = 2.0**-149
    values = smallest * torch.tensor([[-190.0, -128.0, -3.0, 0.0, 127.0, 189.0]]).view(1, 1, 6)
    codes, scales = kernels.quantize_rows(values, torch.int8)
    assert scales.unique().tolist() == [smallest]
    assert codes.flatten().tolist() == [-127, -127, -3, 0, 127, 127]


ON_LOGITS = [
    kernels.kd_loss,
    kernels.decoupled_kl,
    kernels.grouped_kl,
    kernels.correlation,
    kernels.standardised_kd_loss,
]


@pytest.mark.parametrize("loss", [*ON_LOGITS, kernels.feature_mse, kernels.feature_cosine, kernels.attention_transfer])
def test_a_float16_gradient_is_scaled_before_it_is_rounded(loss):
    """A mean over many has gradients around 1e-6, where float16 has few digits left. A loss scale comes in time."""
    generator = torch.Generator().manual_seed(0)
    shape = (8192, 32) if loss in ON_LOGITS else (4, 32, 32, 32)
    student, teacher = (torch.randn(shape, generator=generator).half() for _ in range(2))
    more = {kernels.decoupled_kl: (torch.arange(8192) % 32,)}.get(loss, ())
    exact = student.float().requires_grad_()
    (loss(exact, teacher.float(), *more) * 1024).backward()
    student.requires_grad_()
    (loss(student, teacher, *more) * 1024).backward()
    assert (student.grad.float() - exact.grad).norm() < 2e-3 * exact.grad.norm()
