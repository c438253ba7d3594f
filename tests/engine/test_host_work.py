"""What the host does per step: a replay, copies into the inputs, and nothing that stays behind."""

import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.engine import stage as stage_module
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage, merge_neighbours
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.execution.capture import EmulatedRunner
from stablekd_fast.execution.moments import HostCopy
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import LiveTeacher, Relay

CPU = torch.device("cpu")
SGD = Optimizer("sgd", lr=0.01)
AIMS = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")


class Dispatched(TorchDispatchMode):
    """The operations that were dispatched from Python, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


class SilentRunner(EmulatedRunner):
    """A graph's replay costs the host one call and dispatches nothing; the emulator's own operations are not
    counted."""

    replays = 0

    def run(self):
        type(self).replays += 1
        with _disable_current_modes():
            return super().run()


@pytest.fixture
def training(small_net, random_batch, settled, one_thread):
    """A stage of a pair in training: `train()` takes one step, `steps` are its groups'."""
    paired = pair_blocks(settled(small_net(2, 1)), small_net(1, 2), random_batch(0).images, ["0", "1", "2"])

    class Training:
        def __init__(self, groups, mode="emulate", optimizer=SGD, ema=0.9):
            nn.ModuleList(paired.student_blocks).train()
            self.paired, self.groups = paired, groups
            self.relay = Relay(paired, LiveTeacher(paired, mode, fall_back=False))
            self.batches, self.turn = [random_batch(seed) for seed in range(4)], 0
            average = {name: p.detach().clone() for name, p in paired.student.named_parameters()}
            rates = Rates.of_stage(PlannedStage(Stage(groups, steps=40), 0, 40), ema, CPU)
            self.stage = stage_steps(paired, groups, AIMS, optimizer, rates=rates, history=4, ema=average)
            self.steps, self.inputs, self.wanted = self.stage.steps, self.stage.inputs, self.stage.wanted
            self.load()
            self.runner = self.stage.runner(mode)

        def load(self):
            self.stage.load(self.relay, self.batches[self.turn % 4])
            self.turn += 1

        def train(self):
            self.load()
            self.runner.run()

        def close(self):
            self.runner.close()
            self.relay.close()

    return Training


@pytest.mark.parametrize("groups", merge_neighbours(4), ids=str)
def test_a_captured_step_is_a_replay_each_of_teacher_and_students_and_a_copy_per_input(training, monkeypatch, groups):
    monkeypatch.setattr("stablekd_fast.execution.capture.EmulatedRunner", SilentRunner)
    stage = training(groups)
    for _ in range(3):
        stage.train()
    SilentRunner.replays = 0
    with Dispatched() as dispatched:
        for _ in range(5):
            stage.train()
    assert SilentRunner.replays == 5 * 2, "all groups are in one"
    # Images, labels and each of the teacher's outputs into the inputs; images into the teacher's own.
    assert dispatched.names == ["aten.copy_"] * 5 * (2 + len(stage.wanted) + 1)
    stage.close()


def test_the_count_would_show_an_operation_of_the_host(training, monkeypatch):
    monkeypatch.setattr("stablekd_fast.execution.capture.EmulatedRunner", SilentRunner)
    stage = training([[0], [1], [2], [3]])
    monkeypatch.setattr(stage, "load", lambda load=stage.load: (load(), stage.inputs["images"].mean()))
    for _ in range(3):
        stage.train()
    with Dispatched() as dispatched:
        stage.train()
    assert set(dispatched.names) == {"aten.copy_", "aten.mean"}
    stage.close()


def live_tensors():
    """How many there are, and the bytes of their memory; those that other tests left faked or wrapped have none."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
    tensors = [thing for thing in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(thing)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return len(tensors), sum(storages.values())


@pytest.mark.parametrize("mode", ["eager", "emulate"])
@pytest.mark.parametrize("optimizer", [Optimizer("adamw", lr=0.01, clip=1.0), Optimizer("sgd", lr=0.01, nesterov=True)])
def test_steps_keep_no_tensor_that_they_made(training, mode, optimizer):
    stage = training([[0, 1], [2, 3]], mode, optimizer)
    for _ in range(3):
        stage.train()
    before = live_tensors()
    for _ in range(20):
        stage.train()
    assert live_tensors() == before
    stage.close()


def test_a_tensor_that_is_kept_would_show(training):
    stage = training([[0, 1], [2, 3]], "eager")
    stage.train()
    before, kept = live_tensors(), []
    for _ in range(20):
        stage.train()
        kept.append(stage.steps[0].losses.clone())
    assert live_tensors() > before
    stage.close()


def places(paired):
    named = (*paired.student.named_parameters(), *paired.student.named_buffers())
    return {name: tensor.data_ptr() for name, tensor in named}


@pytest.mark.parametrize("mode", ["eager", "emulate"])
def test_weights_and_buffers_stay_where_they_are_across_steps_and_merges(training, mode):
    """What else a step keeps stays where it is within a stage."""
    first, states = None, []
    for groups in merge_neighbours(4):
        stage = training(groups, mode)
        first = first or places(stage.paired)
        own = [tensor.data_ptr() for step in stage.steps for tensor in step.state()]
        inputs = [stage.inputs[name].data_ptr() for name in ("images", "labels")]
        for _ in range(4):
            stage.train()
            assert places(stage.paired) == first
            assert [tensor.data_ptr() for step in stage.steps for tensor in step.state()] == own
            assert [stage.inputs[name].data_ptr() for name in ("images", "labels")] == inputs
            assert all(parameter.grad is None for parameter in stage.paired.student.parameters())
        states.append([value.clone() for value in stage.paired.student.parameters()])
        stage.close()
    assert not any(torch.equal(a, b) for a, b in zip(*states[:2]))


@pytest.mark.parametrize("capture", ["eager", "emulate"])
@pytest.mark.parametrize("log_every, readings", [(2, 10), (5, 4), (100, 2)])
def test_losses_are_read_every_so_many_steps_only(make, monkeypatch, one_thread, capture, log_every, readings):
    """20 steps in two stages; a reading is due at the end of each stage too."""
    made = []

    class Counted(HostCopy):
        def __init__(self, tensors):
            made.append(len(tensors))
            super().__init__(tensors)

    monkeypatch.setattr(stage_module, "HostCopy", Counted)
    stages = [Stage(groups, steps=10, optimizer=Optimizer(lr=0.01)) for groups in ([[0], [1], [2, 3]], [[0, 1, 2, 3]])]
    settings = {"epochs": 4.0, "validation": 40, "evaluate_every": 0, "checkpoint_every": 1000}
    make(stages=stages, log_every=log_every, capture=capture, **settings).run(progress=False)
    assert len(made) == readings
    assert set(made) == {3, 1}, "one reading for all groups"
