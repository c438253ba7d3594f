"""The step's GPU path without a GPU: fake tensors on the device `cuda`.

Fake tensors carry device and dtype but no data, so a tensor on the wrong device and a read of device data by the host
(`.item()`, a branch on a loss) are errors here as they would be, or would cost a wait, on a GPU. Two things are lent
to torch, which without a driver does not have them: a walk through autograd's graph (its engine asks the driver for
streams), and the shape function of the fused optimizer.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from stablekd_fast import models
from stablekd_fast.bench.standin.fakes import on_fake_cuda, walk_backward
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.config import DistillConfig, objectives_of
from stablekd_fast.data import Batch
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage, merge_neighbours
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.errors import CaptureError
from stablekd_fast.execution.emulator import Recording, Watch
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import METHODS, Objectives, objective
from stablekd_fast.run.builders import auxiliary_facts
from stablekd_fast.teacher.live import LiveTeacher, Relay

CUDA = torch.device("cuda")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
aten = torch.ops.aten


@pytest.fixture
def paired():
    teacher, student = models.build("resnet32", 10).eval(), models.build("resnet20_half", 10)
    return pair_blocks(teacher, student, torch.randn(4, 3, 16, 16))


@pytest.fixture
def fakes_need_no_driver():
    """Older torch (seen with 2.6) asks the CUDA driver even to copy fake tensors."""
    try:
        with FakeTensorMode():
            torch.zeros(1, device="cuda").copy_(torch.ones(1, device="cuda"))
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} cannot copy fake CUDA tensors here: {str(error).splitlines()[0]}")


def test_the_walk_through_the_graph_is_torch_s_backward():
    def gradients(backward):
        torch.manual_seed(0)
        net = models.build("resnet20_half", 10).double()
        x = net.conv1(torch.randn(4, 3, 16, 16, dtype=torch.float64))
        y = net.layer1(x)
        backward([y, y.sum()], [torch.ones_like(y), torch.tensor(2.0, dtype=torch.float64)])
        return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]

    for ours, theirs in zip(gradients(walk_backward), gradients(torch.autograd.backward), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class FakeRecording(Recording):
    """Records; stands in for fused AdamW, of which it checks that everything lies on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (aten._fused_adamw_, aten._fused_sgd_):
            tensors = [
                t for value in (*args, *kwargs.values()) for t in (value if isinstance(value, list) else [value])
            ]
            devices = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
            assert devices == {"cuda"}, devices
            self.fused_dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor)}
            return None
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.fixture
def lent(monkeypatch, fakes_need_no_driver):
    """What stands in for a driver; autocast believes that there is one."""
    monkeypatch.setattr(torch.autograd, "backward", walk_backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


def run_under_fakes(paired, precision, optimizer, ema):
    """All stages, a step each, on fake CUDA tensors; the operations of the teacher and of the steps."""
    paired.precision = Precision(precision)
    mode = FakeTensorMode()
    on_fake_cuda(paired, mode)
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    teacher, steps = FakeRecording(), FakeRecording()
    with mode:
        batch = Batch(
            torch.empty(8, dtype=torch.int64), 0, torch.empty(8, 3, 16, 16), torch.empty(8, dtype=torch.int64)
        )
        average = {name: torch.empty_like(p) for name, p in paired.student.named_parameters()}
        for groups in merge_neighbours(4):
            planned = PlannedStage(Stage(groups, steps=4, optimizer=optimizer), 0, 4)
            rates = Rates.of_stage(planned, ema, CUDA)
            stage = stage_steps(paired, groups, aims, optimizer, rates=rates, history=2, ema=average)
            with teacher:
                stage.load(Relay(paired, LiveTeacher(paired)), batch)
            with steps:
                stage.run()
    return teacher, steps


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "optimizer", [Optimizer("adamw", clip=1.0), Optimizer("sgd", nesterov=True, decay="weights")], ids=["adamw", "sgd"]
)
def test_whole_steps_stay_on_the_device_in_their_precision_and_never_ask_the_host(paired, lent, precision, optimizer):
    """The teacher's pass, forward, losses, backward, clipping, update, average, bookkeeping."""
    teacher, steps = run_under_fakes(paired, precision, optimizer, 0.99)
    for operation in steps.operations:  # 0-dim tensors of the host are numbers to the device
        devices = {t.device.type for t in (*operation.inputs, *operation.outputs) if t.dim() > 0}
        assert devices <= {"cuda"}, operation
    low = LOW.get(precision, torch.float32)
    convolutions = [
        (operation.function, {t.dtype for t in (*operation.inputs, *operation.outputs)})
        for operation in (*teacher.operations, *steps.operations)
        if operation.function.overloadpacket in (aten.convolution, aten.convolution_backward, aten.cudnn_convolution)
    ]
    assert any(function is aten.convolution_backward.default for function, _ in convolutions)
    assert {dtype for _, dtypes in convolutions for dtype in dtypes} == {low}
    norms = [o for o in steps.operations if "batch_norm" in str(o.function) and "backward" not in str(o.function)]
    assert norms
    for operation in norms:
        held = [t for t in operation.inputs if t.dim() == 1]
        assert {t.dtype for t in held} == {torch.float32}, "affine weights and statistics stay float32"
    for operation in steps.operations:
        casts = operation.function.overloadpacket is aten._foreach_copy_
        if operation.function._schema.is_mutable and "foreach" in str(operation.function) and not casts:
            assert {t.dtype for t in operation.inputs} <= {torch.float32}, operation.function
    for operation in steps.operations:  # on a device the other operand would be rounded to the low precision first
        if operation.function.overloadpacket is aten.mul and low != torch.float32:
            low_first = any(t.dtype == low and t.dim() > 0 for t in operation.inputs)
            assert not (low_first and torch.float32 in {t.dtype for t in operation.inputs}), operation
    if optimizer.name == "adamw":
        assert steps.fused_dtypes == {torch.float32}


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("tf32", True)])
def test_backward_too_multiplies_in_the_precision_of_the_run(paired, lent, monkeypatch, precision, allowed):
    """cuDNN reads the switch when it runs, and has it on by default."""
    seen, backends = [], (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]

    def backward(outputs, gradients):
        seen.extend(backend.allow_tf32 for backend in backends)
        walk_backward(outputs, gradients)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    run_under_fakes(paired, precision, Optimizer("sgd"), None)
    assert set(seen) == {allowed}
    assert before == [backend.allow_tf32 for backend in backends]


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.ones(3).copy_(x),
        lambda x: x.cpu(),
    ],
)
def test_a_copy_between_host_and_device_that_waits_is_refused_before_anything_is_captured(fakes_need_no_driver, copy):
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with pytest.raises(CaptureError, match="aten.(copy_|_to_copy).default cannot be captured: it copies"), Watch():
            copy(x)
        with Watch():
            x.copy_(torch.ones(3), non_blocking=True)


def test_without_a_driver_autocast_would_not_show(paired, lent, monkeypatch):
    """The student's weights are cast; without autocast nothing that meets them is."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: True)
    inert = pytest.warns(UserWarning, match="CUDA is not available")
    with inert, pytest.raises(RuntimeError, match="float32.* and weight type .*bfloat16"):
        run_under_fakes(paired, "bf16", Optimizer("sgd"), None)


def test_the_check_would_catch_a_host_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(1, device="cuda").item()


def test_the_check_would_catch_a_tensor_on_the_wrong_device():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="cuda") + torch.ones(3)


WITHOUT = ("kdiga", "multi-teacher", "fast-dfkd", "mekd", "bpr", "unkd")
NEIGHBOURS = [
    name for name, method in METHODS.items() if (method.auxiliary, method.feature, method.logits) != (None, "mse", "kd")
]


@pytest.mark.parametrize("method", [name for name in NEIGHBOURS if name not in WITHOUT])
def test_losses_of_the_field_stay_on_the_device_and_never_ask_the_host(paired, lent, monkeypatch, method):
    """Left out are kdiga, which differentiates twice, as the walk through the graph does not; multi-teacher, which
    reads a file; and what has no images, or a teacher that is a function."""

    def grad(outputs, inputs):
        walk_backward([outputs], [torch.ones_like(outputs)])
        return (inputs.grad,)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    aims = objectives_of(DistillConfig(method=method))
    facts = auxiliary_facts(paired, 10, 100, 8, (16, 16), torch.device("cpu"))
    aims, mode, steps = aims.made(facts, 0), FakeTensorMode(), FakeRecording()
    on_fake_cuda(paired, mode, beside=[] if aims.module is None else [aims.module])
    groups = [list(range(len(paired)))]
    with mode:
        images = torch.empty(8, 3, 16, 16)
        batch = Batch(torch.empty(8, dtype=torch.int64), 0, images, torch.empty(8, dtype=torch.int64), images)
        optimizer = Optimizer("sgd")
        stage = stage_steps(paired, groups, aims, optimizer, rates=Rates.constant(0.1, device=CUDA))
        stage.load(Relay(paired, LiveTeacher(paired)), batch)
        with steps:
            stage.run()
    for operation in steps.operations:
        devices = {t.device.type for t in (*operation.inputs, *operation.outputs) if t.dim() > 0}
        assert devices <= {"cuda"}, operation
