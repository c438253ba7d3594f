"""The real torchdistill package with this engine's parts."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from stablekd_fast.errors import CacheError, ConfigError

pytest.importorskip("torchdistill")

from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.mid_level import KDLoss

from stablekd_fast.integrations.torchdistill import (
    FastDKDLoss,
    FastKDLoss,
    SampleViews,
    SharedBlocks,
)

LOGITS = {
    "student_module_path": ".",
    "student_module_io": "output",
    "teacher_module_path": ".",
    "teacher_module_io": "output",
}
CUTS = ["layer1", "layer2", "layer3"]
APART, MERGED = [[0], [1], [2], [3]], [[0, 1, 2, 3]]
SEQUENTIAL = {"class_or_func": torch.utils.data.SequentialSampler}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def kd_term(key="KDLoss", **settings):
    return {
        "criterion": {"key": key, "kwargs": {**LOGITS, "temperature": 4.0, "alpha": 0.9, **settings}},
        "weight": 1.0,
    }


def feature_term(path):
    sides = {
        side: {"is_from_teacher": side == "target", "module_path": path, "io": "output"} for side in ("input", "target")
    }
    return {
        "criterion": {"key": "FastMSELoss", "kwargs": {"normalize": "power"}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": sides},
        "weight": 1.0,
    }


def stage(terms, *, loader=None, teacher=None, student=None, lr=0.05, **others):
    common = {"sequential": [], "forward_proc": "forward_batch_only"}
    return {
        "num_epochs": 1,
        "train_data_loader": loader or {},
        "teacher": {**common, "requires_grad": False, **(teacher or {})},
        "student": {**common, "requires_grad": True, **(student or {})},
        "optimizer": {"key": "SGD", "kwargs": {"lr": lr, "momentum": 0.9, "weight_decay": 1e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        **others,
    }


def wrapped(shared, groups, forward_proc="forward_batch_only"):
    """Settings of both models for decomposed or merged training."""
    hooks = {"forward_hook": {"output": CUTS}}
    return {
        "teacher": {
            "forward_proc": forward_proc,
            "auxiliary_model_wrapper": {"key": "StableKDTeacher", "kwargs": {"shared": shared}},
            **hooks,
        },
        "student": {
            "auxiliary_model_wrapper": {"key": "StableKDStudent", "kwargs": {"shared": shared, "groups": groups}},
            **hooks,
        },
    }


STABLEKD_TERMS = {name: feature_term(name) for name in CUTS} | {"kd": kd_term("FastKDLoss", alpha=1.0, beta=0.1)}


def make_box(config, teacher, student, data=None):
    return get_distillation_box(teacher, student, data or {}, config, torch.device("cpu"), None, False, 1)


def train_epoch(box, epoch):
    """As torchdistill's scripts do."""
    box.pre_epoch_process(epoch=epoch)
    losses = []
    for batch in box.train_data_loader:
        loss = box.forward_process(*batch)
        box.post_forward_process(loss=loss)
        losses.append(loss.item())
    box.post_epoch_process()
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.5},
        {"alpha": 0.9, "beta": 0.3},
        {"alpha": 0.5, "label_smoothing": 0.1},
        {"alpha": 0.0},
        {"alpha": None, "beta": 1.0},
        {"alpha": 1.0},
    ],
)
@pytest.mark.parametrize("with_targets", [True, False])
def test_the_kd_loss_is_torchdistills(settings, with_targets, random_batch):
    found = []
    for kind in (KDLoss, FastKDLoss):
        student, teacher = (random_batch(seed)[0].double().flatten(1)[:, :10] for seed in (1, 2))
        student.requires_grad_()
        loss = kind(**LOGITS, temperature=3.0, **settings)
        targets = random_batch(0)[1] if with_targets else None
        value = loss({".": {"output": student}}, {".": {"output": teacher}}, targets)
        found.append((value, *torch.autograd.grad(value, student)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)


def test_settings_that_the_kd_loss_does_not_have_are_refused():
    with pytest.raises(ConfigError, match="Use torchdistill's KDLoss"):
        FastKDLoss(**LOGITS, temperature=1.0, alpha=0.5, reduction="sum")
    with pytest.raises(ConfigError, match="ignore_index"):
        FastKDLoss(**LOGITS, temperature=1.0, alpha=0.5, ignore_index=3)


def test_the_dkd_loss_takes_logits_where_torchdistill_has_them(random_batch):
    images, labels = random_batch(0)
    logits = images.flatten(1)[:, :10]
    loss = FastDKDLoss(**LOGITS)({".": {"output": logits}}, {".": {"output": logits.clone()}}, labels)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.9)], ids=["ilsvrc2012", "cifar10"])
def test_fifty_steps_of_torchdistills_sample_objectives_are_the_same(
    temperature, alpha, small_net, settled, random_batch
):
    """The objectives of its sample configs, in float32. Losses and weights differ by roundings that training carries
    on."""
    results, teacher = [], settled(small_net(2, 0))
    for key in ("KDLoss", "FastKDLoss"):
        student = small_net(1, 1)
        box = make_box(stage({"kd": kd_term(key, temperature=temperature, alpha=alpha)}, lr=0.01), teacher, student)
        box.pre_epoch_process()
        teacher.eval()
        losses = []
        for step in range(50):
            loss = box.forward_process(*random_batch(step % 10, 32), {})
            box.post_forward_process(loss=loss)
            losses.append(loss.detach())
        results.append([torch.stack(losses), *student.state_dict().values()])
    assert float(results[0][0][-10:].mean()) < float(results[0][0][:10].mean())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [APART, [[0, 1], [2, 3]], MERGED])
def test_gradients_are_those_of_the_engine(groups, small_net, settled, random_batch, engine_gradients):
    teacher, student = settled(small_net(2, 0, (12, 16, 16))).double(), small_net(1, 1).double()
    images, labels = random_batch(0)
    images = images.double()
    shared = SharedBlocks(CUTS)
    box = make_box(stage(STABLEKD_TERMS, **wrapped(shared, groups)), teacher, student)
    box.pre_epoch_process()
    before = copy.deepcopy(student.state_dict())
    box.forward_process(images, labels, {}).backward()
    got = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    student.load_state_dict(before)
    expected = engine_gradients(shared.paired, groups, images, labels)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_wrapped_student_saves_and_evaluates_as_the_plain_one(small_net, settled, random_batch):
    student = small_net(1, 1)
    box = make_box(stage(STABLEKD_TERMS, **wrapped(SharedBlocks(CUTS), APART)), settled(small_net(2, 0)), student)
    box.pre_epoch_process()
    box.post_forward_process(box.forward_process(*random_batch(0), {}))
    assert box.student_model.state_dict().keys() == student.state_dict().keys()
    fresh = small_net(1, 2)
    fresh.load_state_dict(box.student_model.state_dict())
    images = random_batch(1)[0]
    assert torch.equal(box.student_model.eval()(images), fresh.eval()(images))


def test_wrappers_that_do_not_fit_are_refused(small_net, settled, random_batch):
    teacher, student = settled(small_net(2, 0)), small_net(1, 1)
    with pytest.raises(ConfigError, match="once each, in order"):
        make_box(stage({}, **wrapped(SharedBlocks(CUTS), [[0], [1]])), teacher, student)
    strangers = wrapped(SharedBlocks(CUTS), APART) | {"student": wrapped(SharedBlocks(CUTS), APART)["student"]}
    box = make_box(stage(STABLEKD_TERMS, **strangers), teacher, student)
    box.pre_epoch_process()
    with pytest.raises(ConfigError, match="give both wrappers one SharedBlocks"):
        box.forward_process(*random_batch(0), {})


class Pixels:
    """As torchvision's CIFAR10 looks from outside."""

    transforms = None

    def __init__(self, count: int = 20) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(count)]


def make_views(**settings):
    return SampleViews(Pixels(), views=2, batch_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, **settings)


def loader(workers=0, **settings):
    return {
        "dataset_id": "train",
        "requires_supp": False,
        "sampler": SEQUENTIAL,
        "kwargs": {"batch_size": 8, "num_workers": workers},
        **settings,
    }


def views_stage(shared, groups=APART, workers=0, **settings):
    models = wrapped(shared, groups, "forward_batch_supp_dict")
    return stage(STABLEKD_TERMS, loader=loader(workers), pre_epoch_process="begin_view", **models, **settings)


def test_views_are_those_of_the_engine_in_any_process():
    """Also in a worker that outlives the epoch."""
    views = make_views(seed=3)
    worker = torch.utils.data.DataLoader(views, batch_size=8, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        views.set_epoch(epoch)
        batches = list(worker)
        assert [len(images) for images, _, _ in batches] == [8, 8, 4]
        images, labels, keys = batches[1]
        expected = views.source.batch(np.arange(8, 16), epoch % 2)
        assert torch.equal(images, expected.images) and torch.equal(labels, expected.labels)
        assert keys["sample_id"].tolist() == list(range(8, 16)) and keys["view"].tolist() == [epoch % 2] * 8
    assert torch.equal(views[5][0], views.source.batch(np.array([5]), 0).images[0])


def test_large_images_have_views_too(tmp_path):
    from PIL import Image

    folder, generator = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(4):
        Image.fromarray(generator.integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    dataset = type("Folder", (), {"samples": [(str(path), 0) for path in sorted(folder.iterdir())]})()
    views = SampleViews(dataset, views=1, batch_size=2, mean=(0.5,) * 3, std=(0.5,) * 3, size=32)
    views.set_epoch(0)
    image, _, keys = views[3]
    assert image.shape == (3, 32, 32) and keys == {"sample_id": 3, "view": 0}
    assert torch.equal(image, next(views.source.whole_view(0)).images[1]) is False
    assert torch.equal(image, list(views.source.whole_view(0))[1].images[1])


def test_data_without_keys_are_refused(tmp_path, small_net, settled, random_batch):
    with pytest.raises(ConfigError, match="give the training data as SampleViews"):
        SharedBlocks(CUTS, directory=str(tmp_path))
    with pytest.raises(ConfigError, match="no keys"):
        dataset = Pixels()
        dataset.transform = object()
        SampleViews(dataset, views=1, batch_size=8)
    with pytest.raises(ConfigError, match="neither `data`"):
        SampleViews(TensorDataset(torch.zeros(1)), views=1, batch_size=1)
    with pytest.raises(ConfigError, match="no mean and std"):
        SampleViews(Pixels(), views=1, batch_size=1)
    with pytest.raises(ConfigError, match="No epoch was begun"):
        make_views()[0]
    shared = SharedBlocks(CUTS, views=make_views(), directory=str(tmp_path))
    config = stage(STABLEKD_TERMS, **wrapped(shared, APART, "forward_batch_supp_dict"))
    box = make_box(config, settled(small_net(2, 0)), small_net(1, 1))
    box.student_model.train()
    with pytest.raises(ConfigError, match="without the keys sample_id and view"):
        box.forward_process(*random_batch(0), {})


def test_begin_view_wants_views(small_net, settled):
    data = {"train": TensorDataset(*[torch.zeros(8)] * 2)}
    box = make_box(
        stage({}, loader=loader(), pre_epoch_process="begin_view"), settled(small_net(1, 0)), small_net(1, 1), data
    )
    with pytest.raises(ConfigError, match="requires_supp: False"):
        box.pre_epoch_process(epoch=0)


def run_from_views(small_net, settled, epochs=4, teacher_seed=0, workers=0, **settings):
    """Losses, the student's weights, and how often the teacher's first layer ran."""
    views, teacher, student, ran = make_views(), settled(small_net(2, teacher_seed)), small_net(1, 1), []
    teacher.layer1[0].register_forward_hook(lambda *_: ran.append(1))
    shared = SharedBlocks(CUTS, views=views, **settings)
    box = make_box(views_stage(shared, workers=workers), teacher, student, {"train": views})
    losses = [loss for epoch in range(epochs) for loss in train_epoch(box, epoch)]
    shared.close()
    return losses, list(student.state_dict().values()), len(ran)


def test_rows_give_the_numbers_of_the_live_teacher_and_spare_it(tmp_path, small_net, settled):
    """Batches of 8, 8 and 4 in two views over four epochs."""
    live = run_from_views(small_net, settled)
    kept = run_from_views(small_net, settled, directory=str(tmp_path))
    again = run_from_views(small_net, settled, directory=str(tmp_path), workers=1)
    for losses, weights, _ in (kept, again):
        # A short batch is filled up, which may round differently.
        torch.testing.assert_close(losses, live[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights, live[1], rtol=1e-5, atol=1e-6)
    assert kept[0] == again[0] and all(torch.equal(a, b) for a, b in zip(kept[1], again[1]))
    looks = again[2]  # at cutting, in both modes and for two numbers of images, composing, and for the form of rows
    assert live[2] >= 12 and kept[2] == 6 + looks and looks < 6


def test_rows_of_another_teacher_are_refused(tmp_path, small_net, settled):
    run_from_views(small_net, settled, epochs=1, directory=str(tmp_path))
    with pytest.raises(CacheError, match="made for something else"):
        run_from_views(small_net, settled, epochs=1, teacher_seed=7, directory=str(tmp_path))


def test_stages_decompose_and_merge(tmp_path, small_net, settled):
    views, teacher, student = make_views(), settled(small_net(2, 0)), small_net(1, 1)
    shared = SharedBlocks(CUTS, views=views, directory=str(tmp_path))
    config = {"stage1": {**views_stage(shared), "num_epochs": 2}, "stage2": views_stage(shared, MERGED, lr=0.005)}
    box = make_box(config, teacher, student, {"train": views})
    paired, losses = None, []
    for epoch in range(3):
        losses += train_epoch(box, epoch)
        assert paired in (None, shared.paired)  # cut once
        paired = shared.paired
    assert box.stage_number == 2 and box.student_model.groups == MERGED
    assert all(np.isfinite(losses))
