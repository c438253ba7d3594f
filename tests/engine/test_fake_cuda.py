"""The step's GPU path without a GPU: fake tensors on the device `cuda`.

Fake tensors carry device and dtype but no data, so a tensor on the wrong device and a read of device data by the host
(`.item()`, a branch on a loss) are errors here as they would be, or would cost a wait, on a GPU. Backward and
the fused optimizer are left out: autograd asks for the device's context, and the optimizer has no fake kernel.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from stablekd_fast import models
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.data import Batch
from stablekd_fast.objectives import objective
from stablekd_fast.schedule import Optimizer, merge_neighbours
from stablekd_fast.step import GroupStep, Objectives, StageInputs, load_batch
from stablekd_fast.teacher import Relay


@pytest.fixture
def paired():
    teacher, student = models.build("resnet32", 10).eval(), models.build("resnet20_half", 10)
    return pair_blocks(teacher, student, torch.randn(4, 3, 16, 16))


def to_fake_cuda(paired, mode):
    """The same blocks with every parameter and buffer replaced by a fake one on `cuda`."""
    holder = torch.nn.ModuleList([paired.teacher, paired.student, *paired.teacher_blocks, *paired.student_blocks])
    holder.extend(bridge for bridge in paired.bridges if bridge is not None)
    replaced = {}

    def fake(tensor):
        if id(tensor) not in replaced:
            with mode:
                made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            parameter = isinstance(tensor, torch.nn.Parameter)
            replaced[id(tensor)] = torch.nn.Parameter(made) if parameter else made
        return replaced[id(tensor)]

    for module in holder.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = fake(tensor)


@pytest.fixture
def fakes_need_no_driver():
    """Older torch (seen with 2.6) asks the CUDA driver even to copy fake tensors."""
    try:
        with FakeTensorMode():
            torch.zeros(1, device="cuda").copy_(torch.ones(1, device="cuda"))
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} cannot copy fake CUDA tensors here: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("fakes_need_no_driver")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_forward_and_losses_stay_on_the_device_and_never_ask_the_host(paired, optimizer):
    mode = FakeTensorMode()
    to_fake_cuda(paired, mode)
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    with mode:
        images = torch.empty(8, 3, 16, 16, device="cuda")
        labels = torch.empty(8, dtype=torch.int64, device="cuda")
        for groups in merge_neighbours(4):
            inputs = StageInputs()
            load_batch(inputs, Relay(paired), aims.teacher_outputs(groups, 3), Batch(labels, 0, images, labels))
            for group in groups:
                step = GroupStep(paired, group, aims, Optimizer(optimizer), inputs)
                step.set_rates(0.01, 0.9)
                outputs, gradients, losses = step.forward()
                assert {tensor.device.type for tensor in (*outputs, *gradients, *losses)} == {"cuda"}
                assert {loss.dtype for loss in losses} == {torch.float32}


def test_the_check_would_catch_a_host_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1, device="cuda").item()


def test_the_check_would_catch_a_tensor_on_the_wrong_device():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="cuda") + torch.ones(3)
