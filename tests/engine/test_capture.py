"""Steps replayed from records of their operations give the bits of eager steps, and planted faults are caught."""

import itertools

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.engine.inputs import IMAGES, LABELS, StageInputs, load_batch, output_key
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage, merge_neighbours
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.errors import CaptureError, ConfigError
from stablekd_fast.execution import capture as capture_module
from stablekd_fast.execution.capture import (
    CompiledRunner,
    EagerRunner,
    EmulatedRunner,
    make_runner,
    pick_capture,
    restored,
)
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import LiveTeacher, Relay

CPU = torch.device("cpu")
CYCLED = {"cycle": "triangular", "momentum_low": 0.7}
OPTIMIZERS = {
    "adamw": Optimizer("adamw", lr=0.01),
    "adamw clipped, weights only": Optimizer("adamw", lr=0.01, clip=0.5, decay="weights"),
    "sgd cycled": Optimizer("sgd", lr=0.1, weight_decay=5e-4, **CYCLED),
    "sgd nesterov": Optimizer("sgd", lr=0.05, nesterov=True, clip=1.0, **CYCLED),
}
PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 36
"""Steps of each of three stages: 108 in all."""


def net(depth, seed, dropout=0.0):
    torch.manual_seed(seed)
    stages = []
    for inside, width, stride in ((3, 8, 1), (8, 16, 2), (16, 16, 2)):
        layers = [
            nn.Conv2d(inside, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
        ]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.fixture
def pair(random_batch, settled):
    def make(precision="fp32", dropout=0.0):
        paired = pair_blocks(settled(net(2, 1)), net(1, 2, dropout), random_batch(0).images, ["0", "1", "2"])
        paired.precision = Precision(precision)
        return paired

    return make


@pytest.fixture
def train(pair, train_stages, random_batch):
    """Three stages, merging in between; all weights, buffers, states and losses at the end of each."""

    def run(mode, optimizer, precision="fp32", aims=None, dropout=0.0, steps=STEPS):
        aims = aims or Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
        groupings = merge_neighbours(4) if aims.align != "none" else [[[0, 1, 2, 3]]]
        stages = [Stage(groups, steps=steps, optimizer=optimizer) for groups in groupings]
        return train_stages(mode, pair(precision, dropout), aims, stages, [random_batch(seed) for seed in range(7)])

    return run


@pytest.mark.parametrize(
    "optimizer, precision", [(o, "fp32") for o in OPTIMIZERS] + [("adamw", "bf16"), ("sgd cycled", "fp16")]
)
def test_replayed_records_give_the_bits_of_eager_steps(train, same_bits, optimizer, precision):
    """Over 108 steps, with rates that cycle and merges in between."""
    eager, emulated = (train(mode, OPTIMIZERS[optimizer], precision) for mode in ("eager", "emulate"))
    assert same_bits(eager, emulated)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("align", ["none", "ends", "all"])
@pytest.mark.parametrize("optimizer, precision", list(itertools.product(OPTIMIZERS, PRECISIONS)))
def test_all_combinations_replay_to_the_bits_of_eager_steps(train, same_bits, optimizer, precision, align, dropout):
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), align)
    eager, emulated = (train(mode, OPTIMIZERS[optimizer], precision, aims, dropout) for mode in ("eager", "emulate"))
    assert same_bits(eager, emulated)


def test_random_numbers_are_drawn_anew_by_every_replay(train, same_bits):
    eager, emulated = (train(mode, OPTIMIZERS["adamw"], dropout=0.3, steps=10) for mode in ("eager", "emulate"))
    assert same_bits(eager, emulated)
    assert not all(torch.equal(a, b) for a, b in zip(eager, train("eager", OPTIMIZERS["adamw"], steps=10)))


@pytest.mark.parametrize(
    "aims",
    [
        Objectives(objective("feature", "mse"), objective("logits", "kd"), "none", use_labels=False),
        Objectives(objective("feature", "mse"), objective("logits", "kd"), "all", use_teacher_logits=False),
    ],
    ids=["logits alone", "labels alone at the head"],
)
def test_objectives_without_labels_or_logits_replay_too(train, same_bits, aims):
    assert same_bits(*(train(mode, OPTIMIZERS["adamw"], aims=aims, steps=5) for mode in ("eager", "emulate")))


# Whole runs.


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "ema": 0.99}, {"method": "kd"}])
def test_a_run_gives_the_same_student_whichever_way_its_steps_run(make, settings):
    students = []
    for capture in ("eager", "emulate"):
        distiller = make(out=capture, capture=capture, **settings)
        result = distiller.run(progress=False)
        students.append((result.accuracy, distiller.paired.student.state_dict()))
    assert students[0][0] == students[1][0]
    assert all(torch.equal(a, b) for a, b in zip(students[0][1].values(), students[1][1].values()))


def test_a_compiled_run_stays_close_to_an_eager_one_and_says_so_captured_or_not(make, monkeypatch):
    """Where there is no GPU its graph is left out: what it would hold is shown in tests/standin."""
    monkeypatch.setattr("stablekd_fast.run.materials.pick_capture", lambda name, device: name)
    monkeypatch.setattr(capture_module, "GraphRunner", lambda phases, *_, compiled: CompiledRunner(phases))
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda body, **how: (compiled.append(how), compile_(body, **how))[1])
    weights = {}
    for capture, count in (("eager", 0), ("compile", 4), ("cudagraph+compile", 8)):
        distiller = make(out=capture, capture=capture, method="blocks", epochs=1.0, optimizer=Optimizer(lr=1e-3))
        assert distiller.decided.identity["compiled"] == ("compile" in capture)
        distiller.run(progress=False)
        assert len(compiled) == count, "one for each block"
        weights[capture] = list(distiller.paired.student.state_dict().values())
    for one, other in zip(weights["eager"], weights["compile"]):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    assert all(torch.equal(*both) for both in zip(weights["compile"], weights["cudagraph+compile"], strict=True))
    assert all(how["options"]["triton.cudagraphs"] is False for how in compiled)


def test_what_cannot_be_compiled_is_named_in_a_sentence():
    def unknown(graph, inputs):
        raise ValueError("no assembler was found")

    body = torch.compile(lambda: torch.ones(3) * 2, backend=unknown)
    with pytest.raises(CaptureError, match="^torch.compile cannot compile the step: .*no assembler was found"):
        make_runner("compile", [body], [], CPU, fall_back=False).run()


# Capturing changes nothing.


def test_making_a_runner_leaves_weights_statistics_moments_and_random_state_alone(pair, random_batch, same_bits):
    paired, inputs = pair(dropout=0.5), StageInputs()
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    load_batch(inputs, Relay(paired), aims.teacher_outputs([[0, 1, 2, 3]], 3), random_batch(0))
    nn.ModuleList(paired.student_blocks).train()
    step = GroupStep(paired, [0, 1, 2, 3], aims, Optimizer(), inputs, rates=Rates.constant(0.1))
    before, random = [tensor.detach().clone() for tensor in step.state()], torch.get_rng_state()
    runner = EmulatedRunner([[step.run]], step.state(), CPU)
    assert same_bits(before, step.state())
    assert torch.equal(random, torch.get_rng_state())
    runner.run()
    assert not all(torch.equal(a, b) for a, b in zip(before, step.state()))
    runner.close()


def test_stages_shorter_than_the_warm_up_are_captured_from_any_of_their_steps(
    pair, random_batch, train_stages, same_bits
):
    """The warm-up goes on behind the step that comes next; the rates that it reads there must be in the table."""
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    batches = [random_batch(seed) for seed in range(4)]
    stages = [Stage(groups, steps=steps, optimizer=OPTIMIZERS["sgd cycled"])
              for steps, groups in ((1, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]]), (3, [[0, 1, 2, 3]]))]  # fmt: skip
    assert same_bits(*(train_stages(mode, pair(), aims, stages, batches) for mode in ("eager", "emulate")))


def test_a_runner_made_before_a_stage_s_last_step_warms_up_behind_it(pair, random_batch):
    paired, inputs = pair(), StageInputs()
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    load_batch(inputs, Relay(paired), aims.teacher_outputs([[0, 1, 2, 3]], 3), random_batch(0))
    nn.ModuleList(paired.student_blocks).train()
    rates = Rates.of_stage(PlannedStage(Stage([[0, 1, 2, 3]], steps=5), 0, 5), None, CPU)
    step = GroupStep(paired, [0, 1, 2, 3], aims, Optimizer(), inputs, rates=rates, position=4)
    runner = EmulatedRunner([[step.run]], step.state(), CPU)
    runner.run()
    assert step.position == 5 and torch.equal(step.current, rates.table[4:5])
    runner.close()


def test_state_names_everything_that_a_step_changes(pair, random_batch):
    """A tensor missing from `state` would carry warm-up steps into training."""
    paired, inputs = pair("fp16"), StageInputs()
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    load_batch(inputs, Relay(paired), aims.teacher_outputs([[0, 1, 2, 3]], 3), random_batch(0))
    average = {name: p.detach().clone() for name, p in paired.student.named_parameters()}
    step = GroupStep(
        paired, [0, 1, 2, 3], aims, OPTIMIZERS["sgd cycled"], inputs, rates=Rates.constant(0.1), ema=average
    )
    held, places = {id(tensor) for tensor in step.state()}, {_memory(tensor) for tensor in step.state()}
    for owner in (step, step.optimizer, step.loss_scale):
        tensors = [value for value in vars(owner).values() if isinstance(value, torch.Tensor)]
        assert {_memory(tensor) for tensor in tensors} - {_memory(step.rates)} <= places
    assert {
        id(tensor) for tensor in (*paired.student.parameters(), *paired.student.buffers(), *average.values())
    } <= held
    assert {id(value) for state in step.optimizer.state.values() for value in state.values()} <= held


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


# Planted faults: each would break a CUDA graph.


class Toy:
    """A weight that follows its input, by an update that can be spoilt."""

    def __init__(self):
        self.weight, self.lr, self.buffer = torch.zeros(4), torch.tensor(0.1), torch.zeros(4)
        self.gradient = torch.zeros(4)
        self.python_lr = 0.1

    def good(self):
        self.gradient = self.weight - self.buffer
        self.weight -= self.lr * self.gradient

    def with_a_python_rate(self):
        self.weight -= self.python_lr * (self.weight - self.buffer)

    def with_a_tensor_made_of_a_python_rate(self):
        self.weight -= torch.tensor(self.python_lr) * (self.weight - self.buffer)

    def reading_the_host(self):
        self.weight -= self.lr.item() * (self.weight - self.buffer)

    def branching_on_data(self):
        if self.weight.sum() < 2:
            self.good()

    def with_a_shape_that_depends_on_data(self):
        self.weight -= self.buffer[self.buffer > 0].sum()

    def writing_where_a_mask_says(self):
        self.weight[self.buffer > 0] = 1.0

    def with_numbers_as_an_index(self):
        self.weight -= self.lr * (self.weight - self.buffer)[torch.arange(3, -1, -1)]

    def comparing_on_the_host(self):
        if not torch.equal(self.weight, self.buffer):
            self.good()


def follow(name, mode, *, reallocate=False, adopt=False):
    toy = Toy()
    runner = None
    for turn in range(10):
        batch = torch.full((4,), float(turn))
        if adopt:
            toy.buffer = batch
        else:
            toy.buffer.copy_(batch)
        toy.lr.fill_(0.1 + 0.01 * turn)
        toy.python_lr = 0.1 + 0.01 * turn
        runner = runner or make_runner(mode, [getattr(toy, name)], [toy.weight], CPU, fall_back=False)
        runner.run()
        if reallocate:
            toy.gradient = torch.full((4,), 3.0)
            toy.weight -= toy.gradient if mode == "eager" and turn < 0 else 0
    return toy.weight


@pytest.mark.parametrize("step", ["good", "with_numbers_as_an_index"])
def test_a_sound_step_replays(step):
    assert torch.equal(follow(step, "eager"), follow(step, "emulate"))


@pytest.mark.parametrize("fault", ["with_a_python_rate", "with_a_tensor_made_of_a_python_rate"])
def test_a_learning_rate_that_is_a_python_number_shows_as_a_difference(fault):
    assert not torch.equal(follow(fault, "eager"), follow(fault, "emulate"))


def test_an_adopted_buffer_of_the_caller_shows_as_a_difference():
    assert not torch.equal(follow("good", "eager", adopt=True), follow("good", "emulate", adopt=True))


@pytest.mark.parametrize(
    "fault, operation",
    [
        ("reading_the_host", "_local_scalar_dense"),
        ("branching_on_data", "_local_scalar_dense"),
        ("with_a_shape_that_depends_on_data", "index"),
        ("writing_where_a_mask_says", "index_put_"),
        ("comparing_on_the_host", "aten.equal"),
    ],
)
def test_a_step_that_asks_the_host_is_refused_by_the_name_of_the_operation(fault, operation):
    with pytest.raises(CaptureError, match=operation):
        follow(fault, "emulate")


def test_a_gradient_that_is_allocated_anew_shows_as_a_difference():
    """Gradients made outside the captured step, and replaced between steps: the replay goes on with the first ones."""

    def run(mode):
        weight = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        weight.grad = torch.zeros(4)
        runner = None
        for turn in range(10):
            weight.grad = weight.detach() - turn
            runner = runner or make_runner(mode, [optimizer.step], [weight], CPU, fall_back=False)
            runner.run()
        return weight.detach()

    assert not torch.equal(run("eager"), run("emulate"))


def test_automatic_capture_falls_back_with_one_sentence_that_names_the_operation():
    toy = Toy()
    with pytest.warns(RuntimeWarning, match="without a captured graph: aten._local_scalar_dense") as caught:
        runner = make_runner("emulate", [toy.reading_the_host], [toy.weight], CPU, fall_back=True)
    assert len(caught) == 1
    assert isinstance(runner, EagerRunner)
    runner.run()


def test_a_step_that_breaks_off_leaves_no_gradient_for_the_first_eager_step():
    """It would be added to that step's own."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def body():
        (weight * weight).sum().backward()
        weight.grad.max().item()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.warns(RuntimeWarning, match="without a captured graph"):
        runner = make_runner("emulate", [body], [weight], CPU, fall_back=True)
    assert weight.grad is None
    runner.run()
    assert torch.equal(weight.detach(), torch.full((4,), 0.8))


def test_modes_that_a_device_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="capture=cudagraph was given, but the device is cpu"):
        pick_capture("cudagraph", CPU)
    with pytest.raises(ConfigError, match=r"capture=cudagraph\+compile was given, but the device is cpu; choose eager"):
        pick_capture("cudagraph+compile", CPU)
    with pytest.raises(ConfigError, match="choose one of"):
        pick_capture("graph", CPU)
    assert pick_capture("auto", CPU) == "eager"
    assert pick_capture("auto", torch.device("cuda")) == "cudagraph"


def test_what_was_restored_is_as_before_even_after_an_error():
    tensor = torch.ones(3)
    with pytest.raises(KeyError), restored([tensor], CPU):
        tensor.zero_()
        raise KeyError
    assert torch.equal(tensor, torch.ones(3))


# The teacher.


def test_a_captured_teacher_gives_the_live_teacher_s_bits_and_never_keeps_a_caller_s_tensor(pair, random_batch):
    paired = pair()
    live = LiveTeacher(paired, "emulate", fall_back=False)
    for seed, wanted in itertools.product(range(5), ({0, 2}, {3})):
        images = random_batch(seed).images
        for _ in range(3):
            expected = paired.teacher_outputs(images, wanted)
            found = live.outputs(images, wanted)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[k], expected[k]) for k in wanted)
        assert torch.equal(images, random_batch(seed).images)
    live.close()


def test_a_captured_teacher_goes_on_from_what_is_known(pair, random_batch):
    paired, images = pair(), random_batch(0).images
    expected = paired.teacher_outputs(images)
    live = LiveTeacher(paired, "emulate", fall_back=False)
    for _ in range(3):
        found = live.outputs(images, [2, 3], {1: expected[1]})
        assert torch.equal(found[3], expected[3])
    with torch.no_grad():
        again = live.outputs(images, [2, 3], {1: torch.zeros_like(expected[1])})
    assert not torch.equal(again[3], expected[3])


def test_inputs_are_copied_and_their_layout_is_checked(random_batch):
    from stablekd_fast.errors import TrainingError

    inputs, images = StageInputs(), random_batch(0).images
    inputs.load(IMAGES, images)
    images.zero_()
    assert inputs[IMAGES].abs().sum() > 0
    with pytest.raises(TrainingError, match="'images' has changed: expected .*strides.*got .*strides"):
        inputs.load(IMAGES, images.to(memory_format=torch.channels_last))
    inputs.load(LABELS, torch.zeros(8, dtype=torch.int64))
    inputs.load(output_key(0), torch.zeros(8, 16, 1, 1))
    inputs.load(output_key(0), torch.zeros(8, 16, 1, 1).to(memory_format=torch.channels_last))  # the same memory
