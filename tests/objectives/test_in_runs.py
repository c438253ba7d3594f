"""Each method of the field in a run: captured, cached, interrupted and inside StableKD's blocks."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from stablekd_fast import models
from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig, exported_name, objectives_of
from stablekd_fast.engine.checkpoint import load_tensors, save_tensors
from stablekd_fast.engine.schedule import Stage
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import METHODS
from stablekd_fast.run.distiller import Distiller

STAGED = ("stablekd", "blocks", "kd", "kd+features", "ce")  # tests/engine looks at them
ELSEWHERE = ("fast-dfkd", "mekd", "bpr", "unkd")  # images that are made, teachers that only answer, no images
NEIGHBOURS = [name for name in METHODS if name not in (*STAGED, *ELSEWHERE)]
SETTINGS = {
    "data": "digits", "teacher": "resnet20", "student": "resnet20_half", "epochs": 2.0, "subset": 64, "batch_size": 16,
    "validation": 0, "bn_images": 16, "views": 1, "precision": "fp32", "device": "cpu", "evaluate_every": 0.0,
    "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a second teacher's weights."""
    path = tmp_path_factory.mktemp("teacher") / "resnet20_half.safetensors"
    torch.manual_seed(1)
    save_tensors(path, models.build("resnet20_half", 10, 8).state_dict(), {})
    return path


@pytest.fixture
def make(tmp_path, weights):
    """Make a run in a folder of this name."""

    def build(method, name, **changed):
        own = {"multi-teacher": {"auxiliary_options": {"teachers": [f"resnet20_half:{weights}"]}}}
        for key, value in {**own, "mix-kd": {"mix": "cutmix"}}.get(method, {}).items():
            changed.setdefault(key, value)
        config = DistillConfig(**{**SETTINGS, "method": method, "out": str(tmp_path / name), **changed})
        torch.manual_seed(0)
        teacher = models.build("resnet20", 10, 8) if config.has_teacher else None
        return Distiller(config, teacher=teacher)

    return build


def finished(distiller):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the teacher knows nothing
        distiller.run(progress=False)
    return load_tensors(distiller.checkpoint)[0]


@pytest.mark.parametrize("method", NEIGHBOURS)
def test_a_neighbour_gives_the_bits_of_its_eager_run(make, method):
    """Captured (emulated), with the teacher's outputs from a cache, and interrupted in its second epoch."""
    plain = make(method, "plain", capture="eager")
    expected = finished(plain)
    cache = CacheSettings(plan="all", directory=str(Path(plain.config.out).parent / "rows"))
    other = {"capture": "emulate", "cache": cache, "checkpoint_every": 3}
    first = make(method, "other", **other)
    assert first.parts.stages[0].last == 8
    stop_after(first, 6)
    again = make(method, "other", resume=True, **other)
    found = finished(again)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    own = [name for name in expected if name.startswith("auxiliary/")]
    module = again.parts.objectives.module
    assert len(own) == (0 if module is None else len(module.state_dict()))
    student = load_tensors(Path(again.config.out) / "student.safetensors")[0]
    name = exported_name(method, "resnet20_half", "resnet20")
    assert student.keys() == models.build(name, 10, 8).state_dict().keys()  # nothing of the loss's own


def stop_after(distiller, step):
    """Let a run die at the begin of a step, which leaves what its last checkpoint has."""
    stream = distiller.parts.stream

    def dying(*args, batches=stream.batches, **kwargs):
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == step:
                raise KeyboardInterrupt
            yield batch

    stream.batches = dying
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        warnings.simplefilter("ignore")
        distiller.run(progress=False)


@pytest.mark.parametrize("method", [name for name in NEIGHBOURS if not METHODS[name].reuses_classifier])
def test_a_neighbours_losses_inside_the_blocks_of_stablekd(make, method):
    """They train the merged student at least; a loss that waits for the merge is named."""
    own = METHODS[method]
    place = {"feature": own.feature, "logits": own.logits, "auxiliary": own.auxiliary}
    options = {f"{key}_options": value for key, value in own.options.items()}
    if method == "multi-teacher":
        options = {}
    if method == "mix-kd":
        options["mix"] = "cutmix"
    distiller = make("stablekd", "inside", **place, **options) if method != "multi-teacher" else make(
        "stablekd", "inside", **place, auxiliary_options=make(method, "x").config.auxiliary_options
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        distiller.run(progress=False)
    module, cuts = distiller.parts.objectives.module, len(distiller.paired.cuts)
    events = [json.loads(line) for line in (Path(distiller.config.out) / "events.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(list(e["losses"].values()))).all() for e in events if e["kind"] == "train")
    rests = [str(warning.message) for warning in said if "rests in stage" in str(warning.message)]
    first = distiller.parts.stages[0].stage.groups
    waits = module is not None and not any(distiller.parts.objectives.helps(group, cuts) for group in first)
    assert bool(rests) == waits
    if module is not None and [p for p in module.parameters() if p.requires_grad]:
        changed = load_tensors(distiller.checkpoint)[0]
        fresh = distiller.parts.objectives.made(module.facts, distiller.config.seed).module.state_dict()
        assert any(not torch.equal(changed[f"auxiliary/{name}"], value) for name, value in fresh.items())


REFUSED = [
    ("dkd", {"mix": "cutmix"}, "dkd needs one class for each image, which mix=cutmix does not leave"),
    ("mix-kd", {"mix": None}, "mix-kd learns from mixed images; give mix=cutmix"),
    ("dist", {"accumulate": 2}, "dist compares the samples of a batch, which accumulate=2 would divide"),
    ("crd", {"accumulate": 2}, "crd compares the samples of a batch"),
    ("crd", {"method": "blocks", "auxiliary": "dlb"}, "reads outputs of blocks that never train as one group"),
    ("kdiga", {"fuse_norms": "on"}, "kdiga differentiates twice, which fused norms cannot"),
    ("fitnet", {"auxiliary_options": {"cut": 9}}, "fitnet.cut=9 was given, but the networks have 3 cuts"),
    ("multi-teacher", {"auxiliary_options": {}}, "name at least one more teacher, as NAME:WEIGHTS"),
    ("kd", {"auxiliary_options": {"weight": 1.0}}, "auxiliary_options were given without auxiliary"),
    ("kd", {"auxiliary": "crdd"}, "There is no auxiliary objective 'crdd'; the nearest is 'crd'"),
    ("crdd", {}, "method 'crdd' does not exist; the nearest is 'crd'"),
    ("simkd", {"blocks": 3}, "blocks was given, but the method simkd cuts both networks before the classifier"),
    ("simkd", {"cuts": ["layer3"]}, "cuts was given, but the method simkd cuts"),
    ("simkd", {"stages": [Stage([[0], [1]], share=1.0)]}, "stages was given, .* trains the student as one"),
    ("simkd", {"student": "simkd/resnet20_half+resnet20"}, "name the student that is to be their encoder"),
    ("stablekd", {"bridge": "none"}, "bridge=none was given, but blocks are to be fed by the teacher"),
]


@pytest.mark.parametrize(("method", "settings", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_in_a_sentence(make, tmp_path, method, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make(settings.pop("method", method), "refused", **settings).run(progress=False)
    assert not (tmp_path / "refused").exists()


def test_losses_that_compare_samples_are_refused_on_ranks_that_divide_them():
    for method, related in (("dist", "dist"), ("crd", "crd"), ("dlb", "dlb")):
        aims = objectives_of(DistillConfig(method=method))
        with pytest.raises(ConfigError, match=f"{related} compares the samples of a batch, which 2 processes"):
            aims.check([[[0, 1]]], 1, accumulate=1, ranks=2, mix=None)
    aims = objectives_of(DistillConfig(method="fitnet"))
    assert aims.check([[[0, 1]]], 1, accumulate=2, ranks=2, mix=None) == []
    aims = objectives_of(DistillConfig(method="ckd"))  # gathers what the others have
    assert aims.check([[[0, 1]]], 1, accumulate=1, ranks=2, mix=None) == []
    with pytest.raises(ConfigError, match="dist compares the samples of a batch, which 2 processes"):
        objectives_of(DistillConfig(method="ckd", logits="dist")).check([[[0, 1]]], 1, accumulate=1, ranks=2, mix=None)


def test_widths_are_bridged_only_where_a_loss_needs_it(make):
    assert make("crd", "wide").paired.bridges == [None] * 3
    assert all(bridge is not None for bridge in make("kd+features", "narrow").paired.bridges)


def test_settings_go_before_what_a_method_stands_for():
    config = DistillConfig(method="crd", logits="dkd", auxiliary_options={"negatives": 5})
    aims = objectives_of(config)
    assert (aims.logits.name, aims.auxiliary.name, aims.auxiliary.config.negatives) == ("dkd", "crd", 5)
    assert aims.logits.config.weight == 1.0  # the method's options were for its own loss
    assert objectives_of(DistillConfig(method="crd")).logits.config.kl_weight == 0.0
