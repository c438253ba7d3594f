"""The network inside what others wrapped around it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stablekd_fast.errors import ModelError

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain network in DataParallel, DistributedDataParallel or `torch.compile`, which shares its parameters.

    Raises ModelError if its parameters are sharded, so that no process holds them whole.
    """
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    kinds |= {type(parameter).__name__ for parameter in model.parameters()}
    sharded = next((kind for kind in (*_SHARDED, "DTensor") if kind in kinds), None)
    if sharded is not None:
        raise ModelError(
            f"The parameters of {type(model).__name__} are sharded ({sharded}): no process holds them whole, as blocks "
            "need them. Give the network before it is sharded; the engine divides work by ranks itself."
        )
    return model
