"""StableKD in a loop of one's own: the engine's losses, and whatever people put around a module."""

import copy
import io
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import stablekd_fast
from stablekd_fast import Blockwise
from stablekd_fast.data import Batch, open_dataset
from stablekd_fast.engine.inputs import StageInputs, load_batch
from stablekd_fast.engine.schedule import DECOMPOSED_SHARE, MERGED_LR, Optimizer, PlannedStage, Stage
from stablekd_fast.engine.step import GroupStep, Rates
from stablekd_fast.errors import CheckpointError, ConfigError, ModelError
from stablekd_fast.integrations.views import SampleViews
from stablekd_fast.objectives import Objectives, objective
from stablekd_fast.teacher.live import Relay

APART, MERGED = [[0], [1], [2], [3]], [[0, 1, 2, 3]]
WIDE = (12, 16, 24)
RATE = 0.02


@pytest.fixture
def pair(small_net, settled):
    """A teacher with statistics, and a student narrower than it, so that bridges are in play."""

    def make(dtype=torch.float32, student_seed=1):
        return settled(small_net(2, 0, WIDE)).to(dtype), small_net(1, student_seed).to(dtype)

    return make


@pytest.fixture
def default_dtype():
    """Sets the default type, which is that of the engine's table of rates and of its losses."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def digits(steps, dtype, size=32):
    """Batches of real images, normalised."""
    split = open_dataset("digits").train
    images = (split.images.permute(0, 3, 1, 2) / 128 - 1).to(dtype)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [(images[part], split.labels[part]) for part in order.split(size)[:steps]]


def engine_losses(paired, batches, stages):
    """The losses of all groups and cuts of each step, added up, as the engine trains."""
    aims, done, losses = Objectives(objective("feature", "mse"), objective("logits", "kd"), "all"), 0, []
    for groups, count, peak in stages:
        planned = PlannedStage(Stage(groups, steps=count, optimizer=Optimizer(lr=peak)), done, done + count)
        inputs, rates = StageInputs(), Rates.of_stage(planned, None, torch.device("cpu"))
        settings, wanted = planned.stage.optimizer, aims.teacher_outputs(groups, len(paired.cuts))
        steps = [GroupStep(paired, group, aims, settings, inputs, rates=rates, history=count) for group in groups]
        paired.student.train()
        for images, labels in batches[done : done + count]:
            load_batch(inputs, Relay(paired), wanted, Batch(torch.arange(len(labels)), 0, images, labels))
            for step in steps:
                step.run()
        losses += torch.stack([step.losses for step in steps]).sum(0).tolist()
        done += count
    return losses


def own_losses(skd, batches, stages):
    """The same by a loop of one's own, whose rates are those of the engine's cycles."""
    done, losses = 0, []
    for epoch, (groups, count, peak) in enumerate(stages):
        settings = Optimizer(lr=peak)
        optimizer = torch.optim.AdamW(skd.parameters(), weight_decay=settings.weight_decay)
        skd.begin(epoch)
        assert skd.groups == groups and skd.rate * RATE == pytest.approx(peak)
        for step, (images, labels) in enumerate(batches[done : done + count]):
            optimizer.param_groups[0]["lr"] = settings.lr_at(step / count)
            out = skd(images, labels)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        done += count
    return losses


def largest_difference(ours, engine):
    return max(abs(a - b) / abs(b) for a, b in zip(ours, engine, strict=True))


def test_float64_losses_are_the_engines_over_fifty_steps_with_a_merge(pair, default_dtype):
    default_dtype(torch.float64)
    teacher, student = pair(torch.float64)
    batches, stages = digits(50, torch.float64, 16), [(APART, 38, RATE), (MERGED, 12, MERGED_LR * RATE)]
    twin = Blockwise(*copy.deepcopy((teacher, student)), batches[0][0], 2, share=0.5)
    skd = Blockwise(teacher, student, batches[0][0], 2, share=0.5)
    assert any(bridge is not None for bridge in skd.paired.bridges)
    losses = own_losses(skd, batches, stages)
    assert len(losses) == 50 and losses[37] < losses[0] / 2, "blocks that learn nothing would agree in anything"
    assert largest_difference(losses, engine_losses(twin.paired, batches, stages)) < 1e-9
    for name, value in student.named_parameters():
        torch.testing.assert_close(value, twin.student.get_parameter(name), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("share", "groups"), [(1.0, APART), (0.0, MERGED)])
def test_float32_losses_of_a_first_step_are_the_engines(pair, share, groups):
    teacher, student = pair()
    batches = digits(1, torch.float32)
    twin = Blockwise(*copy.deepcopy((teacher, student)), batches[0][0], 1, share=share)
    skd = Blockwise(teacher, student, batches[0][0], 1, share=share)
    stages = [(groups, 1, RATE)]
    assert largest_difference(own_losses(skd, batches, stages), engine_losses(twin.paired, batches, stages)) < 1e-5


FEATURES = {"feature/layer1", "feature/layer2", "feature/layer3"}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"logits_options": {"temperature": 8.0}}, {"kd"}),
        ({"logits_options": {"kl_weight": 0.101}}, {"kd"}),
        ({"logits_options": {"ce_weight": 1.01}}, {"ce"}),
        ({"logits_options": {"label_smoothing": 0.2}}, {"ce"}),
        ({"feature_options": {"weight": 1.01}}, FEATURES),
        ({"feature_options": {"normalize": None}}, FEATURES),
        ({"feature": "at"}, FEATURES),
        ({"logits": "dkd"}, {"kd"}),
    ],
    ids=lambda one: str(sorted(one)) if isinstance(one, set) else str(one),
)
def test_settings_of_losses_reach_them(pair, settings, changes):
    images, labels = digits(1, torch.float32)[0]
    plain, other = (Blockwise(*pair(), images, 1, **given) for given in ({}, settings))
    plain.begin(0), other.begin(0)
    a, b = plain(images, labels), other(images, labels)
    assert {name for name in a.terms if not torch.isclose(a.terms[name], b.terms[name], rtol=1e-4)} == changes


def test_terms_add_up_and_carry_no_graph(pair):
    images, labels = digits(1, torch.float32)[0]
    skd = Blockwise(*pair(), images, 4)
    skd.begin(0)
    out = skd(images, labels)
    assert list(out.terms) == ["ce", "kd", "feature/layer1", "feature/layer2", "feature/layer3"]
    assert not any(term.requires_grad or term.dim() for term in [*out.terms.values()])
    torch.testing.assert_close(out.loss.detach(), sum(out.terms.values()))
    assert out.loss.requires_grad and not out.logits.requires_grad and out.logits.shape == (32, 10)
    unlabelled = skd(images)
    assert list(unlabelled.terms) == list(out.terms)[1:]
    mixed = skd(images, nn.functional.one_hot(labels, 10).float())
    torch.testing.assert_close(mixed.terms["ce"], out.terms["ce"])


def test_the_students_parameters_are_all_there_is(pair):
    teacher, student = pair()
    skd = Blockwise(teacher, student, digits(1, torch.float32)[0][0], 4)
    assert [id(p) for p in skd.parameters()] == [id(p) for p in student.parameters()]
    own = {f"student.{name}" for name in student.state_dict()}
    assert skd.state_dict().keys() - own == {"_extra_state", "bridges.0.weight", "bridges.2.weight"}
    assert stablekd_fast.Blockwise is Blockwise


def test_the_teacher_goes_along_and_stays_in_evaluation_mode(pair):
    images, labels = digits(1, torch.float64)[0]
    teacher, student = pair()
    skd = Blockwise(teacher.train(), student, images.float(), 4).double()
    assert {value.dtype for value in teacher.state_dict().values()} == {torch.float64, torch.int64}
    skd.begin(0)
    assert not teacher.training and student.training
    before = copy.deepcopy(teacher.state_dict())
    assert skd(images, labels).loss.dtype == torch.float64
    skd.train()  # as Lightning does with all modules
    skd(images, labels).loss.backward()
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in teacher.parameters())


def test_epochs_have_their_groups_and_rates(pair):
    skd = Blockwise(*pair(), digits(1, torch.float32)[0][0], 60)
    last = round(DECOMPOSED_SHARE * 60) - 1
    assert (last, skd.groups_at(last), skd.groups_at(last + 1)) == (44, APART, MERGED)
    assert [skd.rate_at(epoch) for epoch in (0, last, last + 1, 80)] == [1, 1, MERGED_LR, MERGED_LR]
    never, always = (Blockwise(*pair(), digits(1, torch.float32)[0][0], 60, share=share) for share in (0, 1))
    assert [never.rate_at(0), never.groups_at(0)] == [1, MERGED] and [always.rate_at(59), always.groups_at(59)] == [
        1,
        APART,
    ]
    skd.begin(3, [[0, 1], [2, 3]])
    assert skd.groups == [[0, 1], [2, 3]] and skd.rate == 1


def test_what_is_forgotten_is_said(pair):
    images, labels = digits(1, torch.float32)[0]
    skd = Blockwise(*pair(), images, 4)
    with pytest.raises(ConfigError, match=r"call begin\(epoch\) before each epoch"):
        skd(images, labels)
    with pytest.raises(ConfigError, match=r"call begin\(epoch\) before each epoch"):
        _ = skd.rate
    skd.begin(0)
    skd.student.eval()
    with pytest.raises(ConfigError, match="The student is in evaluation mode"):
        skd(images, labels)
    skd.eval()
    with pytest.raises(ConfigError, match="with labels in evaluation mode"):
        skd(images, labels)
    assert torch.equal(skd(images), skd.student(images))
    with pytest.raises(ConfigError, match="needs the class of each image"):
        dkd = Blockwise(*pair(), images, 4, logits="dkd")
        dkd.begin(0)
        dkd(images)


def test_settings_that_cannot_be_used_are_refused(pair, tmp_path):
    images = digits(1, torch.float32)[0][0]
    for settings in ({"epochs": 0}, {"epochs": 4, "share": 1.5}, {"epochs": 4, "merged_rate": 0}):
        with pytest.raises(ConfigError, match="share between 0 and 1"):
            Blockwise(*pair(), images, **settings)
    with pytest.raises(ConfigError, match="make the training data SampleViews"):
        Blockwise(*pair(), images, 4, rows=str(tmp_path))
    with pytest.raises(ConfigError, match="has no option 'temprature'"):
        Blockwise(*pair(), images, 4, logits_options={"temprature": 2})
    skd = Blockwise(*pair(), images, 4)
    for groups in ([[0, 1], [3, 2]], [[0, 1, 2]], [[0, 1, 2, 3], []]):
        with pytest.raises(ConfigError, match="once each, in order"):
            skd.begin(0, groups)
    with pytest.raises(ConfigError, match="counted from 0"):
        skd.begin(-1)


def test_it_shows_its_blocks(pair):
    skd = Blockwise(*pair(), digits(1, torch.float32)[0][0], 60)
    lines = repr(skd).splitlines()
    assert lines[0] == "Blockwise: 45 of 60 epochs decomposed, not begun" and len(lines) == 6
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "4"]
    assert "12x8x8 -> 8x8x8" in lines[2] and "select, 12 -> 8" in lines[2] and "1,668 -> 232" in lines[2]
    skd.begin(0)
    assert "epoch 0: 1|2|3|4" in repr(skd)
    skd.begin(50)
    assert "epoch 50: 1+2+3+4" in repr(skd)


def trained(skd, batches, epochs):
    """Losses of a few epochs by SGD without momentum, which has no state of its own."""
    optimizer, losses = torch.optim.SGD(skd.parameters(), 0.05), []
    for epoch in epochs:
        skd.begin(epoch)
        for images, labels in batches:
            out = skd(images, labels)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
    return losses


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_state_goes_on_with_the_same_bits(pair, form, tmp_path):
    """Into one whose bridges were fitted to other images, by torch's files and by those that take tensors only."""
    batches = digits(6, torch.float32)
    whole = Blockwise(*pair(), batches[0][0], 4)
    trained(whole, batches[:3], [0, 1])
    if form == "torch":
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    else:
        safetensors.torch.save_file(whole.state_dict(), tmp_path / "state")
        state = safetensors.torch.load_file(tmp_path / "state")
    fresh = Blockwise(*pair(student_seed=5), -batches[5][0], 4)
    assert not torch.equal(fresh.bridges["0"].weight, whole.bridges["0"].weight)
    fresh.load_state_dict(state)
    assert fresh.epoch == 1 and fresh.groups == APART
    images, labels = batches[0]
    assert torch.equal(fresh(images, labels).loss, whole(images, labels).loss)
    assert trained(fresh, batches[3:], [2, 3]) == trained(whole, batches[3:], [2, 3])
    other = Blockwise(*pair(), batches[0][0], 4, cuts=["layer1"])
    with pytest.raises(CheckpointError, match="give the cuts by name"):
        other.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda skd: pickle.loads(pickle.dumps(skd))], ids=["deep", "pickle"])
def test_copies_train_by_themselves(pair, copied):
    batches = digits(4, torch.float32)
    skd = Blockwise(*pair(), batches[0][0], 4)
    trained(skd, batches[:1], [0])
    other = copied(skd)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in skd.parameters()}
    assert trained(other, batches, [1, 3]) == trained(skd, batches, [1, 3])


def test_what_changes_the_student_behind_its_back_is_refused(pair):
    images, labels = digits(1, torch.float32)[0]
    skd = Blockwise(*pair(), images, 4)
    nn.SyncBatchNorm.convert_sync_batchnorm(skd)
    with pytest.raises(ModelError, match="was replaced after the networks were cut"):
        skd.begin(0)
    skd = Blockwise(*pair(), images, 4)
    skd.begin(0)
    skd._is_replica = True  # as DataParallel marks its copies
    with pytest.raises(ModelError, match="DistributedDataParallel"):
        skd(images, labels)


def test_gradients_accumulate(pair):
    """Two halves give the gradient of their mean."""
    images, labels = digits(1, torch.float64)[0]
    teacher, student = pair(torch.float64)
    skd = Blockwise(teacher, student, images, 4)
    skd.begin(0)
    expected = [torch.zeros_like(p) for p in skd.parameters()]
    for part in (slice(0, 16), slice(16, 32)):
        found = torch.autograd.grad(skd(images[part], labels[part]).loss, list(skd.parameters()))
        expected = [a + b / 2 for a, b in zip(expected, found)]
    for part in (slice(0, 16), slice(16, 32)):
        (skd(images[part], labels[part]).loss / 2).backward()
    torch.testing.assert_close([p.grad for p in skd.parameters()], expected)


def gradients(skd, images, labels, scale=1.0):
    skd.zero_grad()
    out = skd(images, labels)
    (scale * out.loss).backward()
    return out, torch.cat([p.grad.flatten() for p in skd.parameters()]) / scale


@pytest.mark.parametrize(("dtype", "scale", "tolerance"), [(torch.bfloat16, 1.0, 0.05), (torch.float16, 2.0**10, 0.01)])
def test_autocast_and_a_scaler_go_around_it(pair, dtype, scale, tolerance):
    """Losses are float32; the gradient is the plain one but for roundings."""
    images, labels = digits(1, torch.float32)[0]
    skd = Blockwise(*pair(), images, 4)
    skd.begin(0)
    plain, expected = gradients(skd, images, labels)
    with torch.autocast("cpu", dtype):
        out, found = gradients(skd, images, labels, scale)
    assert out.logits.dtype == dtype and {term.dtype for term in out.terms.values()} == {torch.float32}
    torch.testing.assert_close(out.loss, plain.loss, rtol=0.02, atol=0)
    assert 0 < (found - expected).norm() < tolerance * expected.norm()


def test_float16_gradients_are_scaled_before_they_are_rounded(pair):
    """Those of means over large maps are nothing in float16, else."""
    images = torch.randn(64, 3, 64, 64)
    skd = Blockwise(*pair(), images[:8], 4, feature_options={"weight": 1e-3})
    skd.begin(0)
    with torch.autocast("cpu", torch.float16):
        _, lost = gradients(skd, images, None)
        _, kept = gradients(skd, images, None, 2.0**16)
    first = next(skd.student.parameters()).numel()
    assert kept[:first].norm() > 0 and not torch.allclose(lost[:first], kept[:first], rtol=0.5)


def test_a_scaler_steps(pair):
    batches = digits(3, torch.float32)
    skd = Blockwise(*pair(), batches[0][0], 4)
    optimizer, scaler = torch.optim.SGD(skd.parameters(), 0.05), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skd.begin(0)
    before = copy.deepcopy(skd.student.state_dict())
    for images, labels in batches:
        with torch.autocast("cpu", torch.float16):
            out = skd(images, labels)
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**10 and not torch.equal(before["fc.weight"], skd.student.fc.weight)


class Pixels:
    """As torchvision's CIFAR10 looks from outside."""

    transforms = None

    def __init__(self) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(20)]


def run_with_rows(pair, epochs=4, ids_alone=False, dtype=None, **settings):
    """Losses, the student's weights, and for how many images the teacher's first layer ran in training."""
    views = SampleViews(Pixels(), views=2, batch_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    (teacher, student), losses, ran = pair(), [], []
    skd = Blockwise(teacher, student, views, epochs, **settings)
    teacher.layer1[0].register_forward_hook(lambda module, given, found: ran.append(len(found)))
    optimizer = torch.optim.SGD(skd.parameters(), 0.05)
    loader = torch.utils.data.DataLoader(views, batch_size=8)
    for epoch in range(epochs):
        skd.begin(epoch)
        for images, labels, keys in loader:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                out = skd(images, labels, keys["sample_id"] if ids_alone else keys)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
    skd.close()
    return losses, list(student.state_dict().values()), len(ran)


def test_rows_give_the_numbers_of_the_live_teacher_and_spare_it(pair, tmp_path):
    """Batches of 8, 8 and 4 in two views over four epochs, the last of them merged."""
    live = run_with_rows(pair)
    kept = run_with_rows(pair, rows=str(tmp_path))
    again = run_with_rows(pair, rows=str(tmp_path), ids_alone=True)
    for losses, weights, _ in (kept, again):  # a short batch is filled up, which may round otherwise
        torch.testing.assert_close(losses, live[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights, live[1], rtol=1e-5, atol=1e-6)
    assert kept[0] == again[0] and all(torch.equal(a, b) for a, b in zip(kept[1], again[1]))
    assert (live[2], kept[2], again[2]) == (12, 7, 1), "each run from rows asks once for the form of rows"


def test_rows_of_another_precision_are_not_taken(pair, tmp_path):
    """The precision is that of the autocast around the first batch."""
    plain, cast = tmp_path / "plain", tmp_path / "cast"
    run_with_rows(pair, 1, rows=str(plain))
    with pytest.raises(stablekd_fast.errors.CacheError, match="made for something else"):
        run_with_rows(pair, 1, rows=str(plain), dtype=torch.bfloat16)
    run_with_rows(pair, 1, rows=str(cast), dtype=torch.bfloat16)
    for folder, name in ((plain, "fp32"), (cast, "bf16")):
        manifests = [file.read_text() for file in folder.glob("*/manifest.json")]
        assert len(manifests) == 4 and all(f'"precision": "{name}"' in text for text in manifests)


def test_batches_that_rows_cannot_serve_are_refused(pair, tmp_path):
    views = SampleViews(Pixels(), views=2, batch_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    skd = Blockwise(*pair(), views, 4, rows=str(tmp_path))
    skd.begin(0)
    images, labels = torch.randn(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ConfigError, match="hand on the keys of each batch"):
        skd(images[:8], labels[:8])
    with pytest.raises(ConfigError, match="make them equal"):
        skd(images, labels, torch.arange(16))
