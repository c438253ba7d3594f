"""A stand-in for a CUDA device, on machines that have none: what is done to it is recorded, nothing is computed.

`device.py` takes the place of `torch.cuda`'s streams, events, graphs, generators and allocator, `launches.py` that of
Triton's driver, `traffic.py` watches every operation of a loop on fake CUDA tensors, `budget.py` counts what they are
on a GPU. docs/standin.md says what each proves and what not.
"""

from stablekd_fast.bench.standin.budget import Budget, counting
from stablekd_fast.bench.standin.device import StandIn, standin
from stablekd_fast.bench.standin.launches import Launch, recorded_launches
from stablekd_fast.bench.standin.traffic import Refusal, Shipment, Traffic

__all__ = [
    "Budget",
    "Launch",
    "Refusal",
    "Shipment",
    "StandIn",
    "Traffic",
    "counting",
    "recorded_launches",
    "standin",
]
