"""Steps, averages and every number of the event log against a trainer that shares nothing with the engine."""

import copy
import json

import pytest
import torch
from torch import nn

from stablekd_fast.blocks import pair_blocks
from stablekd_fast.config import DistillConfig
from stablekd_fast.data import Batch
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.engine.schedule import Optimizer, PlannedStage, Stage
from stablekd_fast.engine.stage import stage_steps
from stablekd_fast.engine.step import Rates
from stablekd_fast.execution.precision import Precision
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.run.builders import eval_source
from stablekd_fast.run.distiller import Distiller
from stablekd_fast.teacher.live import LiveTeacher, Relay
from tests.engine.reference_trainer import ReferenceTrainer

APART, HALVES, WHOLE = [[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]


def by_hand(net):
    """Its blocks, in a copy."""
    net = copy.deepcopy(net)
    return [net[0], net[1], net[2], net[3:]]


def soft(labels):
    """As mixing makes them: probabilities of two classes."""
    one_hot = nn.functional.one_hot(labels, 10).double()
    return 0.7 * one_hot + 0.3 * one_hot.flip(0)


SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.05}
CASES = {
    "apart, then merged": dict(stages=[(APART, 4, SGD, False), (WHOLE, 4, {**SGD, "lr": 0.01}, False)]),
    "two by two, states carried": dict(
        stages=[(APART, 3, ADAMW, False), (HALVES, 3, ADAMW, True), (WHOLE, 3, ADAMW, True)], ema=0.5
    ),
    "an average across a merge": dict(stages=[(APART, 4, SGD, False), (WHOLE, 5, SGD, False)], ema=0.4),
    "triangular rates and momenta": dict(
        stages=[(HALVES, 6, {**SGD, "cycle": "triangular", "momentum_low": 0.7, "nesterov": True}, False)]
    ),
    "a long warm-up": dict(stages=[(APART, 5, {**ADAMW, "warmup": 0.6}, False)]),
    "clipped": dict(stages=[(APART, 4, SGD, False)], clip=0.05),
    "a clip that is never reached": dict(stages=[(APART, 4, SGD, False)], clip=1e3),
    "parts of batches": dict(stages=[(APART, 3, SGD, False), (WHOLE, 3, SGD, False)], parts=2, clip=0.5),
    "a narrower student": dict(stages=[(APART, 3, SGD, False), (HALVES, 3, SGD, False)], width=6),
    "a wider student": dict(stages=[(APART, 3, SGD, False)], width=12),
    "aligned at ends": dict(stages=[(HALVES, 3, SGD, False), (WHOLE, 3, SGD, False)], align="ends"),
    "mixed images": dict(stages=[(APART, 2, SGD, False), (WHOLE, 3, SGD, False)], soft=True, ema=0.9),
}
WEIGHTS = {"features": 0.7, "kl": 0.4, "ce": 0.6, "temperature": 2.5}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stages_compute_what_the_reference_computes(case, small_net, random_batch, settled, one_thread):
    """In float64: losses of every step, weights, averages. The rates are float32."""
    parts, clip, ema, width = case.get("parts", 1), case.get("clip"), case.get("ema"), case.get("width", 8)
    teacher, student = settled(small_net(2, 1, 8)).double(), small_net(1, 2, width).double()
    batches = [random_batch(seed, 12) for seed in range(9)]
    batches = [
        Batch(b.sample_ids, 0, b.images.double(), soft(b.labels) if case.get("soft") else b.labels) for b in batches
    ]
    paired = pair_blocks(teacher, student, batches[0].images, cuts=["0", "1", "2"])
    bridges = {k: bridge.weight.double() for k, bridge in enumerate(paired.bridges) if bridge is not None}
    assert bool(bridges) == (width != 8)
    align = case.get("align", "all")
    reference = ReferenceTrainer(by_hand(teacher), by_hand(student), bridges=bridges, inner=align == "all", **WEIGHTS)
    aims = Objectives(
        objective("feature", "mse", {"weight": 0.7}),
        objective("logits", "kd", {"kl_weight": 0.4, "ce_weight": 0.6, "temperature": 2.5}),
        align,
    )
    average = None if ema is None else {n: p.detach().clone() for n, p in paired.student.named_parameters()}
    first, losses, held = 0, [], None
    for groups, count, optimizer, carry in case["stages"]:
        reference.train(
            groups,
            count,
            [(b.images, b.labels) for b in batches],
            **optimizer,
            ema=ema,
            parts=parts,
            clip=clip,
            carry=carry,
        )
        nn.ModuleList([paired.student, *paired.student_blocks]).train()
        settings = Optimizer(**optimizer, clip=clip)
        stage = Stage(groups, steps=count, optimizer=settings, optimizer_state="carry" if carry else "reset")
        rates = Rates.of_stage(PlannedStage(stage, first, first + count), ema, torch.device("cpu"))
        made = stage_steps(paired, groups, aims, settings, rates=rates, history=count, ema=average, micro_batches=parts)
        if carry:
            give(held, made.steps)
        for turn in range(first, first + count):
            made.load(Relay(paired, LiveTeacher(paired)), batches[turn])
            made.run()
        losses += torch.stack([step.losses for step in made.steps], 1).tolist()
        held, first = made.steps, first + count
    for own, expected in zip(losses, reference.losses, strict=True):
        assert own == pytest.approx(expected, rel=2e-6)
    for own, expected in zip(paired.student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)
    for own, expected in zip((average or {}).values(), reference.average or [], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)
    for own, expected in zip(norms(paired.student), norms(nn.Sequential(*reference.student)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [1e-3, 0.3, 1e3, None], ids=str)
def test_a_clipped_step_in_float16_is_that_of_float64(clip, small_net, random_batch, settled, one_thread):
    """Whatever the loss scale: the norm that is clipped is that of the gradient. Below and above the norm."""
    batch = random_batch(0, 12)
    teacher, student = settled(small_net(2, 1, 8)), small_net(1, 2, 8)
    reference = ReferenceTrainer(
        [block.double() for block in by_hand(teacher)], [block.double() for block in by_hand(student)]
    )
    before = [parameter.detach().clone() for parameter in reference.parameters()]
    reference.train(WHOLE, 1, [(batch.images.double(), batch.labels)], **SGD, cycle="constant", clip=clip)
    moved = [own.detach() - start for own, start in zip(reference.parameters(), before)]
    paired = pair_blocks(teacher, student, batch.images, cuts=["0", "1", "2"])
    paired.precision = Precision("fp16")
    aims = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all")
    nn.ModuleList([paired.student, *paired.student_blocks]).train()
    settings = Optimizer(**SGD, cycle="constant", clip=clip)
    made = stage_steps(paired, WHOLE, aims, settings, rates=Rates.constant(SGD["lr"]))
    made.steps[0].loss_scale.scale.fill_(64.0)
    made.load(Relay(paired, LiveTeacher(paired)), batch)
    made.run()
    assert not made.steps[0].loss_scale.skipped.item()
    own = [parameter.detach().double() - start for parameter, start in zip(paired.student.parameters(), before)]
    assert length(*(a - b for a, b in zip(own, moved))) < 0.02 * length(*moved)


def length(*tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def norms(net):
    return [buffer for name, buffer in net.named_buffers() if "running" in name]


def give(before, steps):
    """Hand the optimizer's state of each parameter on."""
    states = {id(p): state for step in before for p, state in step.optimizer.state.items()}
    for step in steps:
        for parameter, state in step.optimizer.state.items():
            for key, value in state.items():
                value.copy_(states[id(parameter)][key])


LENGTHS = [
    (APART, 9, Optimizer("sgd", lr=0.05, weight_decay=1e-3)),
    ([[0, 1], [2], [3]], 14, Optimizer("sgd", lr=0.03, weight_decay=1e-3, clip=0.5)),
    (WHOLE, 4, Optimizer("sgd", lr=0.02, weight_decay=1e-3)),
]
NAMES = [["1", "2", "3", "4"], ["1+2", "3", "4"], ["1+2+3+4"]]
STEPS, PER_EPOCH, EVALUATED = 27, 5, (6, 12, 18, 24, 27)


class Expected:
    """What the log of a run must hold, by the reference, in float64."""

    def __init__(self, reference, batches, held_out, ema):
        self.reference, self.evaluated, self.merges, self.gaps = reference, {}, [], []
        self.entered, self.left = [], []

        def after():
            if reference.step in EVALUATED:
                self.evaluated[reference.step] = reference.evaluate(batches[:3], held_out)[0]

        for groups, steps, own in LENGTHS:
            self.entered.append(reference.probe(groups, batches[:4])[0])
            settings = {"name": "sgd", "lr": own.lr, "weight_decay": own.weight_decay, "clip": own.clip}
            reference.train(groups, steps, batches, ema=ema, after=after, **settings)
            self.left.append(reference.probe(groups, batches[:4])[1])

    def recovered(self, stage, merged):
        """Steps until the mean loss of ten steps of the merged groups is below that at the merge."""
        first = sum(steps for _, steps, _ in LENGTHS[:stage])
        losses = [sum(row[g] for g in merged) for row in self.reference.losses[first : first + LENGTHS[stage][1]]]
        at_merge = sum(self.entered[stage][g] for g in merged)
        means = [sum(losses[end - 10 : end]) / 10 for end in range(10, len(losses) + 1)]
        return next((end + 10 for end, mean in enumerate(means) if mean < at_merge), None)


def close(values, expected, rel=3e-4):
    assert values == pytest.approx(expected, rel=rel, abs=1e-6)


@pytest.mark.parametrize("every, ema, width", [(1, None, 8), (7, 0.6, 8), (3, None, 6)])
def test_every_number_of_the_event_log_is_the_reference_s(small_net, settled, digits, tmp_path, every, ema, width):
    """A run of three stages, evaluated in between, from the images that its source gives."""
    config = DistillConfig(
        out=str(tmp_path / "run"), epochs=STEPS / PER_EPOCH, subset=160, validation=40, batch_size=32, log_every=every,
        bn_images=96, cuts=["0", "1", "2"], device="cpu", precision="fp32", evaluate_every=1.2, ema=ema, seed=3,
        stages=[Stage(groups, steps=steps, optimizer=own) for groups, steps, own in LENGTHS], copy_classifier=False,
        logits_options={"temperature": 2.5, "kl_weight": 0.4, "ce_weight": 0.6}, feature_options={"weight": 0.7},
    )  # fmt: skip
    teacher, student = settled(small_net(2, 1, 8)), small_net(1, 2, width)
    distiller = Distiller(config, teacher=teacher, student=student, dataset=digits)
    batches = [(b.pixels.double(), b.labels) for b in distiller.source.batches(0, STEPS)]
    held_out, test = (
        [(b.pixels.double(), b.labels) for b in source.batches()]
        for source in (distiller.parts.validation, eval_source(digits, digits.test, config))
    )
    bridges = {k: one.weight.double() for k, one in enumerate(distiller.paired.bridges) if one is not None}
    blocks = ([block.double() for block in by_hand(net)] for net in (teacher, student))
    reference = ReferenceTrainer(*blocks, bridges=bridges, **WEIGHTS)
    expected = Expected(reference, batches, held_out, ema)
    result = distiller.run(progress=False)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    found = {kind: [event for event in events if event["kind"] == kind] for kind in {e["kind"] for e in events}}
    compare_losses(found["train"], reference, every)
    compare_merges(found, expected)
    reached, model = reference.evaluate(batches[:3], test)
    compare_evaluations(found["evaluate"], {**expected.evaluated, "test": reached})
    compare_result(tmp_path / "run", result, reached, model)


def compare_losses(events, reference, every):
    ends = {9, 23, 27}
    read = [s for s in range(1, STEPS + 1) if s % every == 0 or s in EVALUATED or s % PER_EPOCH == 0 or s in ends]
    assert [event["step"] for event in events] == read
    for event, before in zip(events, [0, *read]):
        step = event["step"]
        names = NAMES[0 if step <= 9 else 1 if step <= 23 else 2]
        rows = reference.losses[before:step]
        close(event["losses"], {name: sum(row[g] for row in rows) / len(rows) for g, name in enumerate(names)})
        close(event["lr"], reference.rates[step - 1])
        close(event["epoch"], step / PER_EPOCH)


def compare_merges(found, expected):
    starts, ends, merges = found["stage_start"], found["stage_end"], found["merge"]
    assert [(e["step"], e["groups"], e["first_step"], e["last_step"]) for e in starts] == [
        (0, LENGTHS[0][0], 0, 9),
        (9, LENGTHS[1][0], 9, 23),
        (23, LENGTHS[2][0], 23, 27),
    ]
    assert [e["step"] for e in ends] == [9, 23], "a stage of one group has no exposure"
    close(ends[0]["exposure_gap"], dict(zip(["1", "2", "logits"], expected.left[0][1:])), rel=2e-3)
    close(ends[1]["exposure_gap"], dict(zip(["2", "logits"], expected.left[1][1:])), rel=2e-3)
    assert [(m["merge_step"], m["step"], m["stage"], m["merged"]) for m in merges] == [
        (9, 23, 1, ["1+2"]),
        (23, 27, 2, ["1+2+3+4"]),
    ]
    for stage, merged in ((1, [0]), (2, [0])):
        assert merges[stage - 1]["exposure_gap"] == ends[stage - 1]["exposure_gap"]
        close(merges[stage - 1]["loss_at_merge"], dict(zip(NAMES[stage], expected.entered[stage])))
        assert merges[stage - 1]["steps_until_recovered"] == expected.recovered(stage, merged)


def compare_evaluations(events, expected):
    assert [(e["split"], e["step"]) for e in events] == [*(("validation", s) for s in EVALUATED), ("test", STEPS)]
    for event in events:
        accuracy, top5, loss = expected["test" if event["split"] == "test" else event["step"]]
        close([event["accuracy"], event["top5"]], [accuracy, top5], rel=1e-9)
        close(event["loss"], loss, rel=1e-3)
        close(event["epoch"], event["step"] / PER_EPOCH)


def compare_result(out, result, reached, model):
    [written] = json.loads((out / "results.json").read_text())["runs"]
    assert (written["accuracy"], written["top5"], written["steps"]) == (result.accuracy, result.top5, STEPS)
    close([result.accuracy, result.top5, result.epochs], [*reached[:2], STEPS / PER_EPOCH], rel=1e-9)
    expected = {name.removeprefix("3."): value for name, value in model.state_dict().items()}  # the last block: net[3:]
    exported, _ = load_tensors(out / "student.safetensors")
    assert exported.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(exported[name].double(), value, rtol=2e-3, atol=1e-4)
