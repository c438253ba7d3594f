"""The optimizers against torch's own with rates as Python numbers, and what they leave alone."""

import sys

import pytest
import torch
from torch import nn

from stablekd_fast.engine.checkpoint import load_optimizer_tensors, load_tensors, optimizer_tensors, save_tensors
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.optimizers import build_optimizer
from stablekd_fast.engine.schedule import Optimizer
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20


def network(dtype=torch.float64):
    """Without a bias before the norm: its gradient is rounding alone, which Adam would scale up."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).to(dtype)


def set_gradients(net, turn):
    """Gradients of a loss that depends on the weights, by turn."""
    generator = torch.Generator().manual_seed(turn)
    images = torch.randn(6, 3, 4, 4, generator=generator).to(next(net.parameters()).dtype)
    net.zero_grad()
    net(images).square().mean().backward()


def built(settings, net, lr=0.1, momentum=0.9):
    """Our optimizer with the tensors that it reads."""
    parameters = list(net.parameters())
    rates = [torch.tensor(value, dtype=parameters[0].dtype) for value in (lr, momentum)]
    return build_optimizer(settings, parameters, *rates), *rates


def rates_at(turn):
    return 0.02 + 0.01 * (turn % 7), 0.95 - 0.02 * (turn % 5)


def differences(one, other):
    """The largest difference of each parameter, relative to its largest value."""
    pairs = zip(one.parameters(), other.parameters())
    return [((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_sgd_is_torch_s_with_rates_that_change_at_every_step(nesterov, weight_decay):
    """float64, so that what is left of 20 steps is rounding."""
    ours, theirs = network(), network()
    settings = Optimizer("sgd", nesterov=nesterov, weight_decay=weight_decay)
    optimizer, lr, momentum = built(settings, ours)
    reference = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=weight_decay, nesterov=nesterov)
    for turn in range(STEPS):
        values = rates_at(turn)
        lr.fill_(values[0]), momentum.fill_(values[1])
        for group in reference.param_groups:
            group["lr"], group["momentum"] = values
        for net, one in ((ours, optimizer), (theirs, reference)):
            set_gradients(net, turn)
            one.step()
    assert max(differences(ours, theirs)) < 1e-12
    assert max(differences(ours, network())) > 1e-3


@pytest.mark.parametrize("implementation", ["auto", "fused"])
def test_adamw_is_torch_s_with_rates_that_change_at_every_step(implementation):
    ours, theirs = network(), network()
    optimizer, lr, _ = built(Optimizer("adamw", weight_decay=0.05, implementation=implementation), ours)
    reference = torch.optim.AdamW(theirs.parameters(), 0.1, weight_decay=0.05, foreach=False, fused=False)
    for turn in range(STEPS):
        lr.fill_(rates_at(turn)[0])
        for group in reference.param_groups:
            group["lr"] = rates_at(turn)[0]
        for net, one in ((ours, optimizer), (theirs, reference)):
            set_gradients(net, turn)
            one.step()
    assert max(differences(ours, theirs)) < 1e-12
    assert max(differences(ours, network())) > 1e-3


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_alone_are_decayed_on_demand(name):
    """Gradients of zero: only decay moves anything."""
    factors = {}
    for decay in ("all", "weights"):
        net = network()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(1.0)
        optimizer, *_ = built(Optimizer(name, weight_decay=0.5, decay=decay), net)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        factors[decay] = {key: parameter.flatten()[0].item() for key, parameter in net.named_parameters()}
    assert factors["all"] == dict.fromkeys(factors["all"], pytest.approx(0.95, abs=1e-12))
    matrices = {"0.weight", "4.weight"}
    expected = {key: pytest.approx(0.95, abs=1e-12) if key in matrices else 1.0 for key in factors["all"]}
    assert factors["weights"] == expected


@pytest.fixture
def step_of(make):
    """A step of one group over a batch, with the learning rate given."""

    def build(settings, precision=None, lr=0.1):
        distiller = make()
        aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
        inputs, paired = StageInputs(), distiller.paired
        load_batch(inputs, Relay(paired), {0, 1, 2, 3}, next(iter(distiller.source.batches(0, 1))))
        nn.ModuleList(paired.student_blocks).train()
        return GroupStep(paired, [0, 1, 2, 3], aims, settings, inputs, rates=Rates.constant(lr, 0.0))

    return build


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_clipping_is_that_of_torch(step_of, clip):
    """Against one update with gradients clipped by hand in float64; a norm below the limit is left alone."""
    step = step_of(Optimizer("sgd", weight_decay=0.0, clip=clip))
    outputs, gradients, _ = step.forward()
    step.backward(outputs, gradients)
    before = [parameter.detach().double() for parameter in step.parameters.values()]
    copies = [nn.Parameter(value.clone()) for value in before]
    for copy, parameter in zip(copies, step.parameters.values()):
        copy.grad = parameter.grad.double()
    norm = nn.utils.clip_grad_norm_(copies, clip, foreach=False)
    assert 0.05 < norm < 1e6
    step.take_rates()
    step.update()
    for parameter, start, copy in zip(step.parameters.values(), before, copies):
        torch.testing.assert_close(parameter.double(), start - step.lr.double() * copy.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", [Optimizer("sgd", nesterov=True), Optimizer("sgd"), Optimizer("adamw")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_step_found_infinite_leaves_weights_and_moments_exactly_as_they_are(settings, value):
    net = network(torch.float32)
    optimizer, *_ = built(settings, net)
    optimizer.found_inf = torch.tensor(0.0)
    set_gradients(net, 0)
    optimizer.step()

    def kept():
        states = [value.clone() for state in optimizer.state.values() for value in state.values()]
        return [*(parameter.detach().clone() for parameter in net.parameters()), *states]

    before = kept()
    set_gradients(net, 1)
    net[0].weight.grad.fill_(value)
    optimizer.found_inf.fill_(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, kept(), strict=True))
    set_gradients(net, 1)
    optimizer.found_inf.fill_(0.0)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, kept()))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_parameters_without_a_gradient_are_left_alone(name):
    net = network(torch.float32)
    optimizer, *_ = built(Optimizer(name, weight_decay=0.5), net)
    set_gradients(net, 0)
    net[0].weight.grad = None
    before = net[0].weight.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[net[0].weight].items()}
    others = net[4].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert all(torch.equal(value, optimizer.state[net[0].weight][key]) for key, value in state.items())
    assert not torch.equal(net[4].weight, others)


@pytest.mark.parametrize("name, keys", [("sgd", {"momentum_buffer"}), ("adamw", {"step", "exp_avg", "exp_avg_sq"})])
def test_state_is_there_before_the_first_step_and_stays_where_it_is(name, keys):
    net = network(torch.float32)
    optimizer, *_ = built(Optimizer(name), net)
    places = {}
    for parameter in net.parameters():
        state = optimizer.state[parameter]
        assert set(state) == keys
        assert all(not value.any() for value in state.values())
        places[parameter] = [value.data_ptr() for value in state.values()]
    for turn in range(3):
        set_gradients(net, turn)
        optimizer.step()
    assert all(places[p] == [value.data_ptr() for value in optimizer.state[p].values()] for p in net.parameters())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_saved_state_loads_back_exactly(tmp_path, name):
    """Two runs of ten steps with a file in between end as one of twenty."""
    whole, broken = network(torch.float32), network(torch.float32)
    optimizer, *_ = built(Optimizer(name), whole)
    half, *_ = built(Optimizer(name), broken)
    for turn in range(STEPS):
        set_gradients(whole, turn)
        optimizer.step()
        if turn == STEPS // 2:
            saved = optimizer_tensors("optimizer", dict(broken.named_parameters()), half)
            save_tensors(tmp_path / "state", saved, {})
            loaded = load_tensors(tmp_path / "state")[0]
            assert len(loaded) == len(saved) and all(torch.equal(loaded[key], saved[key]) for key in saved)
            half, *_ = built(Optimizer(name), broken)
            load_optimizer_tensors("optimizer", dict(broken.named_parameters()), half, loaded)
        set_gradients(broken, turn)
        half.step()
    states = [list(one.state.values()) for one in (optimizer, half)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*states) for key in a)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters()))


@pytest.mark.parametrize(
    "settings, message",
    [
        (Optimizer("adamw", implementation="foreach"), "implementation=foreach.*on cpu.*choose fused or auto"),
        (
            Optimizer("adamw", implementation="apex"),
            "NVIDIA apex.*cannot be imported.*github.com/NVIDIA/apex.*choose auto",
        ),
        (Optimizer("sgd", implementation="fused"), "implementation='fused' was given, but sgd has auto, foreach"),
        (Optimizer("sgd", implementation="apex"), "implementation='apex' was given, but sgd has auto, foreach"),
    ],
)
def test_implementations_that_are_not_there_are_refused_with_what_to_choose(monkeypatch, settings, message):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match=message):
        built(settings, network(torch.float32))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_torch_s_fused_sgd_takes_the_steps_of_ours(nesterov, decay):
    """On a GPU it takes the whole step where the momentum does not change; here its CPU form shows what it computes."""
    settings = Optimizer("sgd", lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=decay)
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(3)]
        lr = torch.tensor(0.1, dtype=torch.float64)
        ours = build_optimizer(settings, parameters, lr, torch.tensor(0.8, dtype=torch.float64))
        assert ours.constant == 0.8
        moments = [ours.state[parameter]["momentum_buffer"] for parameter in parameters]
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(5, 3, dtype=torch.float64)
            if fused:
                with torch.no_grad():
                    torch._fused_sgd_(
                        parameters, [p.grad for p in parameters], moments, weight_decay=decay, momentum=ours.constant,
                        lr=lr, dampening=0.0, nesterov=nesterov, maximize=False, is_first_step=False,
                    )  # fmt: skip
            else:
                ours.step()
        results.append(parameters)
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_momentum_that_changes_is_not_baked():
    parameter = nn.Parameter(torch.zeros(2))
    cycled = Optimizer("sgd", momentum_low=0.5)
    made = [build_optimizer(settings, [parameter], torch.tensor(0.1), torch.tensor(0.9)) for settings in (
        cycled, Optimizer("sgd", implementation="foreach"))]  # fmt: skip
    assert [one.constant for one in made] == [None, None]
