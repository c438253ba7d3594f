"""What a run shares and sets for its processes: random states, and the tensor cores' settings, which come back."""

import json

import pytest
import torch

from stablekd_fast.engine.stage import DividedSteps
from tests.processes import output_of

GPU = torch.device("cuda:1")


# Random states.


class TellingRanks:
    """The second rank of two, and what it is told by the first."""

    size, rank, gradient_bytes, other_bytes = 2, 1, 0, 0

    class clock:
        collect = staticmethod(lambda **_: {})

    def broadcast(self, tensors, source):
        for tensor in tensors:
            if tensor.dtype == torch.uint8:  # states of generators
                tensor.fill_(7)


class OneStep:
    name, device = "1", GPU

    def state(self):
        return []


class Places:
    groups_of = staticmethod(lambda rank: [0])
    owner = staticmethod(lambda number: 0)


def test_the_first_rank_s_states_of_all_generators_reach_every_rank(monkeypatch):
    """A rank that goes on from a checkpoint has the first one's states; one that was not stopped must have them too."""
    states = {"cpu": torch.full((8,), 1, dtype=torch.uint8), GPU: torch.full((8,), 2, dtype=torch.uint8)}
    monkeypatch.setattr(torch, "get_rng_state", lambda: states["cpu"].clone())
    monkeypatch.setattr(torch, "set_rng_state", lambda state: states.update(cpu=state))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    DividedSteps(TellingRanks(), Places(), [OneStep()]).broadcast_state()
    assert {place: state.tolist() for place, state in states.items()} == {"cpu": [7] * 8, GPU: [7] * 8}


# Tensor cores.

TOUCHED = {
    "nothing": "",
    "the switch of products": "b.cuda.matmul.allow_tf32 = True",
    "the switch of convolutions": "b.cudnn.allow_tf32 = False",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "products": "b.cuda.matmul.fp32_precision = 'tf32'",
    "products, exact": "b.cuda.matmul.fp32_precision = 'ieee'",
    "convolutions": "b.cudnn.conv.fp32_precision = 'ieee'",
    "cudnn": "b.cudnn.fp32_precision = 'tf32'",
    "all": "b.fp32_precision = 'tf32'",
    "all, exact": "b.fp32_precision = 'ieee'",
}
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from stablekd_fast.execution.precision import Precision
b = torch.backends

def look():
    found = {}
    for name in ("b.cuda.matmul.allow_tf32", "b.cudnn.allow_tf32", "torch.get_float32_matmul_precision()",
                 "b.cuda.matmul.fp32_precision", "b.cudnn.conv.fp32_precision", "b.cudnn.rnn.fp32_precision",
                 "b.cudnn.fp32_precision", "b.fp32_precision", "b.mkldnn.matmul.fp32_precision",
                 "b.mkldnn.conv.fp32_precision"):
        try:
            found[name] = eval(name)
        except (RuntimeError, AttributeError) as error:
            found[name] = type(error).__name__
    return found

exec(sys.argv[1])
before, gpu = look(), torch.device("cuda")
try:
    with Precision("tf32").products(gpu):
        with Precision("fp32").products(gpu):
            inner = look()
        outer = look()
        raise KeyError
except KeyError:
    pass
with Precision("fp32").products(torch.device("cpu")):
    on_cpu = look()
print(json.dumps([before, outer, inner, look(), on_cpu]))
"""


@pytest.mark.parametrize("touched", TOUCHED)
def test_tensor_cores_are_set_and_put_back_whatever_was_touched_before(touched):
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    if "fp32_precision" in TOUCHED[touched] and not newer:
        pytest.skip("this torch has only the switches")
    before, outer, inner, after, on_cpu = json.loads(output_of("-c", PROGRAM, TOUCHED[touched]))
    assert after == before and on_cpu == before
    for found, switch, setting in ((outer, True, "tf32"), (inner, False, "ieee")):
        assert found["b.cuda.matmul.allow_tf32"] is switch and found["b.cudnn.allow_tf32"] is switch
        if newer:
            libraries = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
            assert {found[f"b.{library}.fp32_precision"] for library in libraries} == {setting}
