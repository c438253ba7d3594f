"""Which precision is chosen and why, what computes in it and what stays float32, and the loss scale of float16."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.cache import CacheSettings
from stablekd_fast.cache.fingerprint import teacher_fingerprint
from stablekd_fast.engine.checkpoint import load_metadata, load_tensors
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import Optimizer, Stage
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.errors import ConfigError
from stablekd_fast.execution import precision as precisions
from stablekd_fast.execution.capture import make_runner
from stablekd_fast.execution.precision import LossScale, Precision, pick_precision, seconds_per_pass
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.run.builders import pick_image_dtype
from stablekd_fast.teacher.live import Relay

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
SGD = Optimizer("sgd", lr=0.01)
AIMS = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")


def untried(precision):
    raise AssertionError("nothing is to be measured")


# The choice.


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_by_name_is_taken_unmeasured(name):
    assert pick_precision(name, CPU, untried) == Precision(name)


@pytest.mark.parametrize(
    "name, message",
    [
        ("tf32", "precision=tf32 was given, but cpu has no TF32; choose fp32, bf16 or auto"),
        ("fp8", "choose one of auto, fp32"),
    ],
)
def test_what_is_not_there_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        pick_precision(name, CPU, untried)
    assert pick_precision("tf32", CUDA, untried).name == "tf32"


def test_a_cpu_without_bf16_is_not_measured(monkeypatch):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: False)
    chosen = pick_precision("auto", CPU, untried)
    assert chosen.name == "fp32" and "no bf16" in chosen.reason


@pytest.mark.parametrize("gain, name", [(0.5, "fp32"), (1.1, "fp32"), (2.0, "bf16")])
def test_a_cpu_takes_bf16_only_where_it_is_clearly_faster(monkeypatch, gain, name):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    taken = {"fp32": 0.0205, "bf16": 0.0205 / gain}
    chosen = pick_precision("auto", CPU, lambda precision: taken[precision.name])
    assert chosen.name == name
    assert "fp32 20.5 ms" in chosen.reason and f"bf16 {20.5 / gain:.1f} ms" in chosen.reason


@pytest.mark.parametrize("capability, name", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_a_gpu_takes_what_its_tensor_cores_have(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", CUDA, untried).name == name


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_trial_leaves_the_student_as_it_was(small_net, random_batch, name):
    student, images = small_net(1, 2).train(), random_batch(0).images
    before = {key: value.clone() for key, value in student.state_dict().items()}
    student[-1].weight.grad = torch.full_like(student[-1].weight, 3.0)
    ran = []
    student.register_forward_hook(lambda *_: ran.append(student[0][1].num_batches_tracked.item()))
    random = torch.get_rng_state()
    assert seconds_per_pass(Precision(name), student, images) > 0
    assert len(ran) > 1 and ran[-1] > 0, "the trial does run, in train mode"
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    grads = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
    assert set(grads) == {f"{len(student) - 1}.weight"} and grads[f"{len(student) - 1}.weight"].eq(3.0).all()
    assert student.training and torch.equal(random, torch.get_rng_state())


def test_a_resumed_run_keeps_what_was_chosen_though_a_new_measurement_would_not_choose_it(make, monkeypatch):
    settings = {"precision": "auto", "epochs": 1.0, "out": "run"}
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)

    def measured(fp32, bf16):
        taken = {"fp32": fp32, "bf16": bf16}
        monkeypatch.setattr("stablekd_fast.run.materials.seconds_per_pass", lambda precision, *_: taken[precision.name])

    measured(2.0, 1.0)
    first = make(**settings)
    assert first.paired.precision.name == "bf16"
    first.run(progress=False)
    start = json.loads(open(f"{first.config.out}/events.jsonl").readline())
    assert start["precision"]["name"] == "bf16" and "fp32 2000.0 ms" in start["precision"]["reason"]
    assert load_metadata(f"{first.config.out}/checkpoint.safetensors")["precision"] == "bf16"
    measured(1.0, 2.0)
    assert make(**{**settings, "out": "other"}).paired.precision.name == "fp32"
    resumed = make(**settings, resume=True)
    assert resumed.paired.precision.name == "bf16"
    resumed.run(progress=False)


# What computes in it.


@pytest.fixture
def parts(small_net, random_batch, settled):
    """A pair in a precision with a step of all its blocks, inputs loaded."""

    def build(precision, settings=SGD, ema=None, lr=0.01):
        paired = pair_blocks(settled(small_net(2, 1)), small_net(1, 2), random_batch(0).images, ["0", "1", "2"])
        paired.precision = Precision(precision)
        nn.ModuleList(paired.student_blocks).train()
        inputs = StageInputs()
        load_batch(inputs, Relay(paired), {0, 1, 2, 3}, random_batch(0))
        average = None if ema is None else {name: p.detach().clone() for name, p in paired.student.named_parameters()}
        step = GroupStep(paired, [0, 1, 2, 3], AIMS, settings, inputs, rates=Rates.constant(lr), ema=average)
        return paired, step

    return build


@pytest.mark.parametrize("settings", [Optimizer("sgd", lr=0.01), Optimizer("adamw", clip=1.0)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_convolutions_compute_in_it_and_all_that_is_kept_stays_float32(parts, name, settings):
    paired, step = parts(name, settings, ema=0.9)
    seen = set()
    for network in (paired.teacher, paired.student):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda module, _, output: seen.add((type(module), output.dtype)))
    outputs = paired.teacher_outputs(step.inputs["images"], [0, 3])
    for _ in range(3):
        step.run()
    low = LOW.get(name, torch.float32)
    # Traced blocks call the very modules of the networks, so that the hooks see them.
    assert seen == {(nn.Conv2d, low), (nn.Linear, low)}
    assert outputs[3].dtype == low
    kept = {tensor.dtype for tensor in step.state() if tensor.is_floating_point()}
    assert kept == {torch.float32}
    norms = [module for module in paired.student.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.running_var.dtype == norm.weight.dtype == torch.float32 for norm in norms)
    assert all(norm.num_batches_tracked == 3 for norm in norms)
    assert torch.isfinite(step.losses).all()


def seen_of(distiller) -> tuple[dict, list]:
    """What a run leaves: the checkpoint's tensors, and what its events say of numbers."""
    out = Path(distiller.config.out)
    names = ("kind", "losses", "accuracy", "loss", "exposure_gap", "loss_at_merge", "max_output_difference")
    events = [json.loads(line) for line in (out / "events.jsonl").open()]
    return load_tensors(out / "checkpoint.safetensors")[0], [[event.get(name) for name in names] for event in events]


@pytest.mark.parametrize(
    "name, settings",
    [
        ("bf16", {}),
        ("bf16", {"capture": "emulate"}),
        ("bf16", {"fuse_norms": "off"}),
        ("bf16", {"method": "ce"}),
        ("fp16", {}),
    ],
)
def test_images_handed_out_in_low_precision_change_no_bit(make, name, settings):
    """Decomposed and merged stages, exposure, evaluation: autocast rounds images in any case."""
    runs = []
    for dtype in (LOW[name], torch.float32):
        distiller = make(out=str(dtype), precision=name, epochs=2.0, **settings)
        assert distiller.materials.image_dtype == LOW[name]
        distiller.materials = dataclasses.replace(distiller.materials, image_dtype=dtype)
        distiller.run(progress=False)
        runs.append(seen_of(distiller))
    (tensors, events), (expected, expected_events) = runs
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in tensors)
    assert events == expected_events


def test_rows_of_a_cache_do_not_depend_on_the_type_of_the_images(make, tmp_path):
    runs = []
    for dtype in (torch.bfloat16, torch.float32):  # the second run reads what the first one stored
        cache = CacheSettings(plan="all", directory=str(tmp_path / "rows"))
        distiller = make(out=str(dtype), precision="bf16", epochs=2.0, views=1, cache=cache)
        distiller.materials = dataclasses.replace(distiller.materials, image_dtype=dtype)
        distiller.run(progress=False)
        runs.append(seen_of(distiller))
    live = make(out="live", precision="bf16", epochs=2.0, views=1)
    live.run(progress=False)
    runs.append(seen_of(live))
    for tensors, _ in runs[1:]:
        assert all(torch.equal(tensors[key], runs[0][0][key]) for key in tensors)


class Shifted(nn.Sequential):
    """Looks at images in float32 before its first convolution."""

    def forward(self, x):
        return super().forward(x * 1.1 + 0.1)


@pytest.mark.parametrize("odd", ["teacher", "student"])
def test_networks_that_do_not_round_images_first_get_them_in_float32(small_net, random_batch, odd):
    images = random_batch(0).images
    networks = {"teacher": small_net(2, 1), "student": small_net(1, 2)}
    for network, expected in ((networks[odd], torch.bfloat16), (Shifted(*networks[odd]), torch.float32)):
        networks[odd] = network
        paired = pair_blocks(networks["teacher"].eval(), networks["student"], images, ["0", "1"])
        paired.precision = Precision("bf16")
        before = {name: value.clone() for name, value in paired.student.state_dict().items()}
        assert pick_image_dtype(paired, images) == expected
        assert all(torch.equal(value, before[name]) for name, value in paired.student.state_dict().items())


def test_rows_stored_in_one_precision_are_not_used_in_another(make):
    distiller, found = make(), {}
    for name in ("fp32", "bf16", "fp16"):
        distiller.paired.precision = Precision(name)
        found[name] = teacher_fingerprint(distiller.paired, distiller.source, CPU)
    differing = {key for one, other in zip(found["fp32"], found["bf16"]) for key in one if one[key] != other[key]}
    assert differing == {"precision"}
    assert found["bf16"][0] != found["fp16"][0]


def test_losses_in_bf16_follow_those_in_float32(small_net, random_batch, settled, train_stages):
    """30 steps. A bf16 product is off by up to 2^-8 = 0.4%, and the differences are fed back: 5% of the mean loss."""
    curves = {}
    for name in ("fp32", "bf16"):
        paired = pair_blocks(settled(small_net(2, 1)), small_net(1, 2), random_batch(0).images, ["0", "1", "2"])
        paired.precision = Precision(name)
        stages = [Stage([[0, 1, 2, 3]], steps=30, optimizer=Optimizer("sgd", lr=0.02, weight_decay=0.0))]
        kept = train_stages("eager", paired, AIMS, stages, [random_batch(seed, 32) for seed in range(3)])
        (curves[name],) = [tensor for tensor in kept if tensor.shape == (30,)]
    ours, exact = curves["bf16"], curves["fp32"]
    assert not torch.equal(ours, exact)
    assert exact[-3:].mean() < 0.9 * exact[:3].mean(), "it trains"
    assert (ours - exact).abs().max() < 0.05 * exact.mean()


# The loss scale.


def with_gradients(step, value):
    for parameter in step.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("settings", [Optimizer("sgd", lr=0.01), Optimizer("adamw", clip=1.0)], ids=["sgd", "adamw"])
def test_an_infinite_gradient_halves_the_scale_and_changes_nothing_else(parts, settings):
    paired, step = parts("fp16", settings)
    step.take_rates()
    with_gradients(step, 1024.0)
    step.update()  # so that there are moments
    optimizer = [value for state in step.optimizer.state.values() for value in state.values()]
    kept = [*paired.student.parameters(), *optimizer]
    before = [tensor.detach().clone() for tensor in kept]
    scale, good = step.loss_scale.scale.item(), step.loss_scale.good_steps.item()
    assert good == 1
    for bad in (float("inf"), float("nan")):
        with_gradients(step, 1024.0)
        next(iter(step.parameters.values())).grad.view(-1)[5] = bad
        step.update()
        scale /= 2
        assert step.loss_scale.skipped == 1 and step.loss_scale.scale == scale and step.loss_scale.good_steps == 0
        assert all(torch.equal(a, b) for a, b in zip(before, kept))
    with_gradients(step, 1024.0)
    step.update()
    assert step.loss_scale.skipped == 0 and step.loss_scale.scale == scale
    assert not any(torch.equal(a, b) for a, b in zip(before, kept))


def test_the_scale_is_taken_off_before_the_update(parts):
    """An SGD step from gradients times the scale is that from gradients."""
    _, step = parts("fp16", Optimizer("sgd", weight_decay=0.0))
    step.take_rates()
    before = [parameter.detach().double() for parameter in step.parameters.values()]
    with_gradients(step, 3.0 * step.loss_scale.scale.item())
    step.update()
    for parameter, start in zip(step.parameters.values(), before):
        torch.testing.assert_close(parameter.double(), start - 0.01 * 3.0, rtol=1e-6, atol=1e-7)


def test_good_steps_in_a_row_double_the_scale_when_captured_too():
    """By replays of records: growth, skipping and counting are all on the device."""

    def run(mode):
        scale, seen = LossScale(CPU, 8.0, interval=3), []
        gradient, given = torch.zeros(2), torch.zeros(2)

        def body():
            gradient.copy_(given)
            scale.take_off([gradient])
            scale.update()

        state = [*scale.state().values(), scale.skipped, gradient]
        runner = make_runner(mode, [body], state, CPU, fall_back=False)
        for value in (1.0, 1.0, 1.0, 1.0, 1.0, float("inf"), 1.0, 1.0, 1.0, 1.0):
            given.fill_(value)
            runner.run()
            seen.append((scale.scale.item(), scale.good_steps.item(), scale.skipped.item()))
        return seen

    expected = [8.0, 8.0, 16.0, 16.0, 16.0, 8.0, 8.0, 8.0, 16.0, 16.0]
    assert [scale for scale, *_ in run("eager")] == expected
    assert run("emulate") == run("eager")
    assert [skipped for *_, skipped in run("emulate")] == [0.0] * 5 + [1.0] + [0.0] * 4


def test_whole_steps_that_are_skipped_and_grow_replay_to_the_same_bits(
    small_net, random_batch, settled, train_stages, same_bits, monkeypatch
):
    """A scale too large at first halves until steps are taken, then doubles every other good step."""
    made, update = LossScale.__init__, LossScale.update
    monkeypatch.setattr(LossScale, "__init__", lambda self, device: made(self, device, 2.0**26, 2))
    scales, seen = [], []
    for mode in ("eager", "emulate"):
        monkeypatch.setattr(LossScale, "update", recording(update, scales) if mode == "eager" else update)
        paired = pair_blocks(settled(small_net(2, 1)), small_net(1, 2), random_batch(0).images, ["0", "1", "2"])
        paired.precision = Precision("fp16")
        stages = [Stage([[0, 1, 2, 3]], steps=30, optimizer=Optimizer("sgd", lr=0.01))]
        seen.append(train_stages(mode, paired, AIMS, stages, [random_batch(seed) for seed in range(3)]))
    assert same_bits(*seen)
    changes = [after / before for before, after in itertools.pairwise(scales)]
    assert changes[0] == 0.5 and 2.0 in changes and len(scales) == 30


def recording(update, scales):
    def recorded(self):
        update(self)
        scales.append(self.scale.item())

    return recorded


def test_an_optimizer_that_cannot_skip_is_refused(parts, monkeypatch):
    """Such as AdamW by its foreach implementation, which a CPU does not have: torch's plain one stands for it."""

    def plain(settings, parameters, lr, momentum):
        return torch.optim.AdamW(parameters, foreach=True)

    monkeypatch.setattr("stablekd_fast.engine.step.build_optimizer", plain)
    parts("bf16", Optimizer("adamw"))
    with pytest.raises(ConfigError, match="precision=fp16.*AdamW.*cannot skip a step.*implementation=auto.*bf16"):
        parts("fp16", Optimizer("adamw"))
