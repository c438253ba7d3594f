"""Optimizers whose every changing number is a tensor, so that a step can be captured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.errors import ConfigError


def build_optimizer(
    settings: Optimizer, parameters: list[nn.Parameter], lr: Tensor, momentum: Tensor
) -> torch.optim.Optimizer:
    """The optimizer that the settings name; it reads learning rate and momentum from the 0-dim tensors given.

    State is made here, not by the first step: a captured step must find it at fixed addresses.
    Raises ConfigError for an implementation that does not exist for this optimizer, or is not installed.
    """
    if (settings.name, settings.implementation) not in _BUILDERS:
        known = [implementation for name, implementation in _BUILDERS if name == settings.name]
        raise ConfigError(
            f"optimizer.implementation={settings.implementation!r} was given, but {settings.name} has "
            f"{', '.join(known)}."
        )
    groups = _decay_groups(settings, parameters)
    optimizer = _BUILDERS[settings.name, settings.implementation](settings, groups)
    for group in optimizer.param_groups:  # the constructors compare it with zero, which on a GPU waits for the device
        group["lr"] = lr
    if isinstance(optimizer, SGD):
        optimizer.momentum = momentum
    return optimizer


def _decay_groups(settings: Optimizer, parameters: list[nn.Parameter]) -> list[dict]:
    """`weights`: biases and the vectors of norms (fewer than two dimensions) are not decayed."""
    if settings.decay == "all":
        return [{"params": parameters, "weight_decay": settings.weight_decay}]
    sides = [[p for p in parameters if (p.dim() < 2) == vector] for vector in (False, True)]
    decays = (settings.weight_decay, 0.0)
    return [{"params": side, "weight_decay": decay} for side, decay in zip(sides, decays) if side]


class SGD(torch.optim.Optimizer):
    """SGD with momentum as torch defines it (no dampening), with `lr` and `momentum` as 0-dim tensors.

    torch's own bake the momentum, and whether a step is the first, into a captured graph. `constant`, where given, is
    the momentum of all steps: on a GPU torch's fused kernel then takes the whole step, and bakes what does not change.
    `found_inf`, where set, is a 0-dim tensor: 1 makes the step leave everything as it is.
    """

    def __init__(self, groups: list[dict], nesterov: bool, constant: float | None = None) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.nesterov, self.constant = nesterov, constant
        self.momentum: Tensor = torch.zeros(())
        self.found_inf: Tensor | None = None
        for parameter in _all(self):
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is nothing to evaluate anew
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                grads = [parameter.grad for parameter in params if parameter.grad is not None]
                self._step(params, grads, group["lr"], group["weight_decay"])

    def _step(self, params: list[Tensor], grads: list[Tensor], lr: Tensor, weight_decay: float) -> None:
        moments, momentum = [self.state[parameter]["momentum_buffer"] for parameter in params], self.momentum
        if self.constant is not None and params[0].is_cuda:
            torch._fused_sgd_(
                params, grads, moments, weight_decay=weight_decay, momentum=self.constant, lr=lr, dampening=0.0,
                nesterov=self.nesterov, maximize=False, is_first_step=False, found_inf=self.found_inf,
            )  # fmt: skip
            return
        if weight_decay:
            grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
        if self.found_inf is not None:
            skip = self.found_inf > 0
            grads = [torch.where(skip, torch.zeros_like(grad), grad) for grad in grads]
            lr, momentum = (
                torch.where(skip, torch.zeros_like(lr), lr),
                torch.where(skip, torch.ones_like(momentum), momentum),
            )
        torch._foreach_mul_(moments, momentum)
        torch._foreach_add_(moments, grads)
        updates = moments
        if self.nesterov:
            updates = list(torch._foreach_mul(moments, momentum))
            torch._foreach_add_(updates, grads)
        torch._foreach_sub_(params, torch._foreach_mul(updates, lr))


def _sgd(settings: Optimizer, groups: list[dict]) -> torch.optim.Optimizer:
    return SGD(groups, settings.nesterov, settings.momentum if settings.momentum_low is None else None)


def _foreach_sgd(settings: Optimizer, groups: list[dict]) -> torch.optim.Optimizer:
    return SGD(groups, settings.nesterov)


def _torch_adamw(settings: Optimizer, groups: list[dict], **implementation) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device
    optimizer = torch.optim.AdamW(groups, lr=0.0, capturable=device.type == "cuda", **implementation)
    optimizer._warned_capturable_if_run_uncaptured = True  # running it eagerly too is meant
    for parameter in _all(optimizer):
        optimizer.state[parameter].update(
            step=torch.zeros((), device=device),
            exp_avg=torch.zeros_like(parameter),
            exp_avg_sq=torch.zeros_like(parameter),
        )
    return optimizer


def _fused_adamw(settings: Optimizer, groups: list[dict]) -> torch.optim.Optimizer:
    return _torch_adamw(settings, groups, fused=True)


def _foreach_adamw(settings: Optimizer, groups: list[dict]) -> torch.optim.Optimizer:
    device = groups[0]["params"][0].device
    if device.type != "cuda":
        raise ConfigError(
            f"optimizer.implementation=foreach was given for adamw on {device}, where it takes no learning rate from a "
            "tensor; choose fused or auto."
        )
    return _torch_adamw(settings, groups, foreach=True)


def _apex_adamw(settings: Optimizer, groups: list[dict]) -> torch.optim.Optimizer:
    """NVIDIA apex, which counts steps once per group of parameters: all their states share that count."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            "optimizer.implementation=apex was given, but NVIDIA apex with its extensions cannot be imported "
            f"({error}). Build it from github.com/NVIDIA/apex (the PyPI package of that name is another one), "
            "or choose auto."
        ) from error
    try:
        optimizer = FusedAdam(groups, lr=0.0, adam_w_mode=True, capturable=True)
    except RuntimeError as error:
        raise ConfigError(
            f"apex.optimizers.FusedAdam cannot be used ({error}); choose optimizer.implementation=auto."
        ) from error
    for group in optimizer.param_groups:
        group["step"] = torch.zeros(1, dtype=torch.int32, device=group["params"][0].device)
        for parameter in group["params"]:
            optimizer.state[parameter].update(
                step=group["step"], exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
    return optimizer


_BUILDERS = {
    ("adamw", "auto"): _fused_adamw,
    ("adamw", "fused"): _fused_adamw,
    ("adamw", "foreach"): _foreach_adamw,
    ("adamw", "apex"): _apex_adamw,
    ("sgd", "auto"): _sgd,
    ("sgd", "foreach"): _foreach_sgd,
}


def _all(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
