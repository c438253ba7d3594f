"""How exact a fused loss must be: its error at most twice that of plain PyTorch in the same dtype."""

import torch


def poisoned(monkeypatch):
    """From here on new tensors hold NaN until they are written, so that a forgotten element shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*arguments, original=original, **options):
            out = original(*arguments, **options)
            return out.fill_(torch.nan) if out.is_floating_point() and out.dtype.itemsize > 1 else out

        monkeypatch.setattr(torch, name, filled)


def loss_and_grad(loss, student, *others):
    """`loss(student, *others)` by autograd, and its gradient with respect to the student."""
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *others)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_as_exact_as_pytorch(fused, loss, student, *others):
    """`fused` is (loss, gradient) of our operator; `loss` the same in plain PyTorch, on tensors of any dtype.

    Errors are taken against float64 on the same operands, by the largest absolute deviation. Half a unit in the last
    place of what is returned is granted to everyone.
    """
    eager = loss_and_grad(loss, student, *others)
    exact = loss_and_grad(loss, *(x.double() if x is not None and x.is_floating_point() else x for x in (student, *others)))
    for name, ours, theirs, truth in zip(("loss", "gradient"), fused, eager, exact):
        error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
        rounding = torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item()
        rounding += torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
        assert error <= max(2 * allowed, 2 * rounding), (name, error, allowed, rounding)
