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


def assert_as_exact_as_pytorch(fused, loss, draws):
    """`fused(student, *others)` gives our (loss, gradient), `loss` the same in plain PyTorch; `draws` are operands.

    Errors are taken against float64 on the same operands: of the loss its root mean square over the draws, as a single
    one may be right by luck; of the gradient the largest. One unit in the last place of what is returned is granted.
    """
    ours, theirs, granted = ([], []), ([], []), ([], [])
    for student, *others in draws:
        eager = loss_and_grad(loss, student, *others)
        exact = loss_and_grad(loss, student.double(), *(x.double() for x in others))
        for place, (mine, plain, truth) in enumerate(zip(fused(student, *others), eager, exact)):
            ours[place].append((mine.double() - truth).abs().max())
            theirs[place].append((plain.double() - truth).abs().max())
            finfo = torch.finfo(mine.dtype)
            granted[place].append(finfo.eps * truth.abs().max() + finfo.smallest_normal * finfo.eps)
    for name, place, over_draws in (("loss", 0, lambda x: x.square().mean().sqrt()), ("gradient", 1, torch.max)):
        error, allowed, rounding = (over_draws(torch.stack(x[place])) for x in (ours, theirs, granted))
        assert error <= max(2 * allowed, rounding), (name, error, allowed, rounding)
