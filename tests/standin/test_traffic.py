"""A whole iteration of the loop on fake CUDA tensors: a batch, the teacher or its rows, the step, the log, evaluation.

What the host waits for, and what it ships, is listed here with its price. The list may only get shorter.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stablekd_fast import models
from stablekd_fast.bench.standin import Traffic
from stablekd_fast.bench.standin.fakes import as_cudnn_lays_out, on_fake_cuda, walk_backward
from stablekd_fast.blocks import pair_blocks, serve
from stablekd_fast.cache.columns import Column, row_format
from stablekd_fast.cache.memory_rows import MemoryRows
from stablekd_fast.data import EvalSource, TrainSource, open_dataset
from stablekd_fast.engine.evaluate import evaluate
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage
from stablekd_fast.engine.stage import LossReader, stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.cached import CachedTeacher
from stablekd_fast.teacher.live import Relay

GPU, BATCH = torch.device("cuda", 0), 64
LISTED = {
    (
        "a copy to pageable memory waits for the device",
        "engine/evaluate.py:evaluate",
    ): "the sums of a split are read at its end",
}
"""What an iteration waits for today, and what that costs."""

MOST = {"fp32": (159, 0.5e9), "bf16": (172, 0.26e9)}
"""The most operations and bytes, by precision, of a step of this pair with a live teacher: growth is noticed."""


@pytest.fixture(autouse=True)
def lent(monkeypatch, gpu):
    """What stands in for a driver; autocast believes that there is one."""
    monkeypatch.setattr(torch.autograd, "backward", walk_backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch._C, "_conv_determine_backend_memory_format", as_cudnn_lays_out)


class Iteration:
    """One iteration in a stage of decomposed blocks, under the eyes of `Traffic`."""

    def __init__(self, precision: str = "fp32") -> None:
        self.dataset = open_dataset("digits", image_size=32)
        teacher, student = (
            models.build(name, 10).to(memory_format=torch.channels_last) for name in ("resnet20", "resnet20_half")
        )
        images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        paired = pair_blocks(teacher.eval(), student, images)
        paired.precision, paired.fuses_norms = Precision(precision), True
        self.paired = serve(paired, images, "on")  # as on a GPU
        self.groups = [[k] for k in range(len(self.paired))]
        self.aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
        outputs = self.paired.teacher_outputs(torch.randn(2, 3, 32, 32), set(range(len(self.paired))))
        self.formats = {k: row_format(self.paired, k, value, "fp32") for k, value in outputs.items()}
        on_fake_cuda(self.paired, FakeTensorMode(), "cuda:0")

    def source(self) -> TrainSource:
        data = self.dataset
        return TrainSource(data.train, data.augmentation, data.mean, data.std, batch_size=BATCH, seed=0, device=GPU)

    def run(self, teacher=None) -> Traffic:
        optimizer, traffic = Optimizer("sgd"), Traffic()
        teacher = teacher or Relay(self.paired)
        with FakeTensorMode(allow_non_fake_inputs=True), traffic:
            planned = PlannedStage(Stage(self.groups, steps=4, optimizer=optimizer), 0, 4)
            rates = Rates.of_stage(planned, None, GPU)
            torch.nn.ModuleList(self.paired.student_blocks).train()
            steps = stage_steps(self.paired, self.groups, self.aims, optimizer, rates=rates, history=4)
            batches = iter(teacher.ahead(self.source().batches(0, 3), steps.wanted))
            for number in range(2):  # with the first, images are brought to the device and buffers laid out
                if number == 1:
                    traffic.operations.clear()
                    traffic.refusals.clear()
                    traffic.moved = traffic.shipped = 0
                steps.load(teacher, next(batches))
                steps.run()
                LossReader(steps.steps).start(number + 1, {}, 0)
        return traffic

    def cached(self, tier: str) -> CachedTeacher:
        """All outputs of all images in the memory of the host or of the device."""
        count = len(self.dataset.train)
        place, columns = torch.device("cpu") if tier == "host" else GPU, {}
        for k, form in self.formats.items():
            rows = MemoryRows(form.parts, count, place)
            rows._slots = torch.arange(count)
            columns[k] = Column(f"{k}", form, rows)
        return CachedTeacher(self.paired, columns, self.dataset.train.total, GPU)


def listed(traffic: Traffic) -> set:
    return {(refusal.what, refusal.place) for refusal in traffic.refusals}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_iteration_with_a_live_teacher_waits_for_nothing_and_grows_by_nothing(precision):
    traffic = Iteration(precision).run()
    assert listed(traffic) == set()
    operations, moved = MOST[precision]
    assert 0.9 * operations < traffic.operations.total() <= operations
    assert 0.9 * moved < traffic.moved <= moved
    assert traffic.shipped <= 4096, "where each image is cropped; losses on their way back"


@pytest.mark.parametrize("tier", ["device", "host"])
def test_an_iteration_with_stored_rows_ships_them_and_waits_for_nothing(tier, monkeypatch):
    monkeypatch.setattr("stablekd_fast.cache.memory_rows.core", None)
    iteration = Iteration()
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = iteration.cached(tier)
    traffic = iteration.run(teacher)
    row_bytes = sum(part.bytes for form in iteration.formats.values() for part in form.parts)
    assert listed(traffic) == set()
    rows = BATCH * row_bytes if tier == "host" else 0
    assert rows <= traffic.shipped <= rows + 8192


class Filling(MemoryRows):
    """Rows in main memory, which a thread is handed; here it does nothing with them."""

    def put(self, rows, parts):
        assert all(part.device.type == "cpu" for part in parts)


def test_an_iteration_that_fills_a_cache_ships_its_rows_and_waits_for_nothing():
    iteration = Iteration()
    columns = {
        k: Column(f"{k}", form, Filling(form.parts, 0, torch.device("cpu"))) for k, form in iteration.formats.items()
    }
    teacher = CachedTeacher(iteration.paired, columns, iteration.dataset.train.total, GPU)
    traffic = iteration.run(teacher)
    teacher.close()
    assert listed(traffic) == set()
    rows = BATCH * sum(form.row_bytes for form in iteration.formats.values())
    assert rows <= traffic.shipped <= rows + 8192


def test_an_evaluation_waits_for_what_is_listed():
    iteration, traffic = Iteration(), Traffic()
    data = iteration.dataset
    source = EvalSource(data.test, data.mean, data.std, batch_size=BATCH, device=GPU)

    class Summed:
        def tolist(self):
            return [1.0, 1.0, 1.0, 1.0]

    with FakeTensorMode(allow_non_fake_inputs=True), traffic:
        batches = (batch for batch, _ in zip(source.batches(), range(2)))
        evaluate(iteration.paired.student.eval(), batches, lambda x: x.to(GPU, non_blocking=True), lambda own: Summed())
    assert listed(traffic) == {one for one in LISTED if one[1].startswith("engine/evaluate")}
    assert sum(traffic.refusals.values()) == 1
    made = 3  # one more than is evaluated
    assert traffic.shipped < made * BATCH * (3 * 32 * 32 + 8) + 1024, "images are shipped as bytes"


@pytest.mark.parametrize(
    "asks, what",
    [
        (lambda x: x.sum().item(), "_local_scalar_dense reads a value"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.cpu(), "a copy to pageable memory"),
        (lambda x: torch.ones(1 << 15).to(GPU, non_blocking=True), "comes from pageable memory"),
        (lambda x: torch.ones(1 << 15, pin_memory=True).to(GPU), "comes from pageable memory"),
        (lambda x: x.nonzero(), "nonzero reads a value"),
    ],
)
def test_what_makes_the_host_wait_is_noticed(asks, what):
    traffic = Traffic()
    with FakeTensorMode(), traffic:
        x = torch.ones(1 << 15, device=GPU)
        try:
            asks(x)
        except Exception as error:  # shapes that depend on values do not exist here
            assert "dynamic" in type(error).__name__.lower() or "Dynamic" in str(type(error)), error
    assert any(what in refusal.what for refusal in traffic.refusals), traffic.refusals


def test_a_copy_on_another_stream_is_noticed():
    traffic = Traffic()
    with FakeTensorMode(), traffic, torch.cuda.stream(torch.cuda.Stream(GPU)):
        torch.ones(8).to(GPU)
    assert ["another stream" in refusal.what for refusal in traffic.refusals] == [True]


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: torch.ones(1 << 15, pin_memory=True).to(GPU, non_blocking=True),
        lambda x: torch.ones(1 << 15).pin_memory().to(GPU, non_blocking=True),
        lambda x: torch.ones(1 << 10).to(GPU),
        lambda x: torch.empty(1 << 15, pin_memory=True).copy_(x, non_blocking=True),
        lambda x: x.to(torch.bfloat16),
    ],
)
def test_what_does_not_is_not(asks):
    traffic = Traffic()
    with FakeTensorMode(), traffic:
        asks(torch.ones(1 << 15, device=GPU))
    assert not traffic.refusals


def test_fake_tensors_ask_no_driver_where_devices_are_counted(monkeypatch):
    """Lightning sets this variable for the whole process: torch then believes in a driver if it counts a device."""
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with FakeTensorMode():
        assert torch.ones(2, device=GPU).device == GPU


def test_memory_that_was_pinned_is_not_taken_for_memory_that_is_not():
    """Memory is allocated where other memory was freed."""
    traffic = Traffic()
    with FakeTensorMode(), traffic:
        [torch.ones(1 << 15, pin_memory=True) for _ in range(50)]
        [torch.ones(1 << 15).to(GPU, non_blocking=True) for _ in range(50)]
    assert list(traffic.refusals.values()) == [50]
