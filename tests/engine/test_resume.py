"""Killed with SIGKILL at any step, a resumed run ends with the same bits as one that was not killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stablekd_fast import models
from stablekd_fast.config import DistillConfig, identity
from stablekd_fast.engine import loop
from stablekd_fast.engine.checkpoint import load_tensors, save_tensors
from stablekd_fast.errors import CheckpointError, ConfigError, ModelError, TrainingError
from stablekd_fast.models.weights import load_weights
from tests.processes import Forked

RUN = """
import sys, torch
torch.set_num_threads(1)
from tests_engine_conftest import small_net
from stablekd_fast.cache import CacheSettings
from stablekd_fast.config import DistillConfig
from stablekd_fast.run.distiller import Distiller
from stablekd_fast.engine.schedule import Optimizer

out, resume, cached = sys.argv[1], sys.argv[2] == "resume", sys.argv[3] == "cached"
cache = CacheSettings()
if cached:
    cache = CacheSettings(plan="all", directory=out + "-rows", codecs=["int8"], logits="fp16")
config = DistillConfig(
    out=out, resume=resume, recipe="progressive", epochs=6.0, subset=320, validation=40, batch_size=32, log_every=1,
    bn_images=64,
    cuts=["0", "1", "2"], checkpoint_every=7, device="cpu", precision="fp32", bridge="pca", views=2, cache=cache,
)
digits = torch.load(sys.argv[4], weights_only=False)
Distiller(config, teacher=small_net(6, 1), student=small_net(2, 2), dataset=digits).run(progress=False)
"""


@pytest.fixture(params=["live", "cached"])
def launch(tmp_path, digits_file, request):
    """With the live teacher, and with a cache that the killed runs fill."""

    module = tmp_path / "tests_engine_conftest.py"
    module.write_text((Path(__file__).parent / "conftest.py").read_text())
    script = tmp_path / "run.py"
    script.write_text(RUN)

    return lambda out, mode: Forked(script, out, mode, request.param, digits_file, folder=tmp_path)


def steps_logged(out: Path) -> int:
    path = out / "events.jsonl"
    if not path.exists():
        return 0
    steps = [0]
    for line in path.read_bytes().split(b"\n")[:-1]:
        event = json.loads(line)
        if event["kind"] == "train":
            steps.append(event["step"])
    return steps[-1]


def kill_after(process: Forked, out: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while steps_logged(out) < step:
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_run_killed_in_every_stage_ends_with_the_same_bits(launch, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = launch(whole, "start")
    kill_after(launch(broken, "start"), broken, 1)  # before the first periodic checkpoint
    kill_after(launch(broken, "resume"), broken, 10)  # decomposed
    kill_after(launch(broken, "resume"), broken, 33)  # after the first merge
    kill_after(launch(broken, "resume"), broken, 52)  # end to end
    last = launch(broken, "resume")
    for process in (undisturbed, last):
        assert process.wait(timeout=120) == 0, process.said()

    for name in ("checkpoint.safetensors", "student.safetensors"):
        a, b = load_tensors(whole / name)[0], load_tensors(broken / name)[0]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    train = [
        {e["step"]: e["losses"] for e in map(json.loads, (out / "events.jsonl").open()) if e["kind"] == "train"}
        for out in (whole, broken)
    ]
    assert train[0] == train[1]
    merges = [
        [e for e in map(json.loads, (out / "events.jsonl").open()) if e["kind"] == "merge"] for out in (whole, broken)
    ]
    for merge in merges[0] + merges[1]:
        del merge["time"]
    assert merges[0] == merges[1] and len(merges[0]) == 2
    assert not list(broken.glob(".*.tmp"))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"ema": 0.5}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("stop", [4, 6, 10])
def test_what_a_resumed_run_goes_on_with(make, monkeypatch, settings, stop):
    """Loss scales, averages: every tensor of the checkpoint at the end is that of a run that was not stopped. In
    float16 the first steps overflow, so the scales have changed before the stop, and each group has its own."""
    make(out="whole", checkpoint_every=2, **settings).run(progress=False)
    with monkeypatch.context() as patched:
        original = loop.Engine._save

        def save(self, stage):
            original(self, stage)
            if self.progress.step >= stop:
                raise Stopped

        patched.setattr(loop.Engine, "_save", save)
        with pytest.raises(Stopped):
            make(out="stopped", checkpoint_every=2, **settings).run(progress=False)
    saved = load_tensors(Path(make(out="stopped").config.out) / "checkpoint.safetensors")[0]
    scales = {value.item() for name, value in saved.items() if name.endswith("/scale")}
    assert bool(scales - {2.0**16}) == ("precision" in settings)
    distiller = make(out="stopped", checkpoint_every=2, resume=True, **settings)
    distiller.run(progress=False)
    stopped = Path(distiller.config.out) / "checkpoint.safetensors"
    one, other = load_tensors(stopped.parents[1] / "whole" / stopped.name)[0], load_tensors(stopped)[0]
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_resume_with_other_settings_is_refused_with_the_difference(make):
    make(epochs=1.0).run(progress=False)
    with pytest.raises(CheckpointError, match="seed: was 0, is 1"):
        make(epochs=1.0, seed=1, resume=True).run(progress=False)


def test_how_many_threads_decode_and_how_far_ahead_may_differ_at_a_resume():
    assert identity(DistillConfig(workers=7, prefetch=9)) == identity(DistillConfig())
    with pytest.raises(ConfigError, match="prefetch=0 was given; it must be greater than 0"):
        DistillConfig(prefetch=0)


def test_a_resume_with_another_teacher_is_refused(make):
    make(epochs=1.0).run(progress=False)
    changed = make(epochs=1.0, resume=True)
    with torch.no_grad():
        changed.paired.teacher[0][0].weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(CheckpointError, match="teacher_fingerprint: was '[0-9a-f]{32}'"):
        changed.run(progress=False)


def test_resuming_nothing_and_starting_over_are_refused(make):
    with pytest.raises(CheckpointError, match="no file.*without --resume"):
        make(resume=True).run(progress=False)
    make(epochs=1.0).run(progress=False)
    with pytest.raises(Exception, match="already holds a run.*--resume"):
        make(epochs=1.0).run(progress=False)


def test_a_damaged_checkpoint_is_named(make):
    distiller = make(epochs=1.0)
    distiller.run(progress=False)
    path = Path(distiller.config.out) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="checkpoint.safetensors cannot be read.*damaged"):
        make(epochs=1.0, resume=True).run(progress=False)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The file-size limit of a real process stands for the full disk: the write fails half way."""
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.ones(4)}, {})
    script = f"""
import resource, signal, torch
from pathlib import Path
from stablekd_fast.engine.checkpoint import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save_tensors(Path({str(path)!r}), {{"a": torch.zeros(100_000)}}, {{}})
"""
    process = Forked("-c", script)
    said = process.communicate(120)[0]
    assert process.returncode != 0
    assert "TrainingError" in said and "free some space" in said
    assert load_tensors(path)[0]["a"].eq(1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_writing_into_a_file_s_place_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="choose another --out"):
        save_tensors(tmp_path / "file" / "state.safetensors", {"a": torch.ones(1)}, {})


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "state.safetensors"
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(3, 4),
        "step": torch.tensor(7),
        "half": torch.randn(5).bfloat16(),
        "none": torch.empty(0),
    }
    save_tensors(path, tensors, {"progress": {"step": 7}, "name": "ü"})
    return path, tensors


def test_every_flipped_byte_of_a_checkpoint_is_noticed_or_without_effect(sealed):
    path, tensors = sealed
    whole, without_effect = path.read_bytes(), []
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        try:
            found, metadata = load_tensors(path)
        except CheckpointError as error:
            assert str(path) in str(error) and "damaged" in str(error)
            continue
        assert metadata == {"progress": {"step": 7}, "name": "ü"} and found.keys() == tensors.keys()
        assert all(
            torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors
        )
        without_effect.append(at)
    assert len(without_effect) < 8, "blanks behind the header"


@pytest.mark.parametrize("change", ["other value", "other type", "other shape", "one more", "one less", "other text"])
def test_tensors_that_were_not_written_are_named(sealed, change):
    path, tensors = sealed
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    other = {
        "other value": {**tensors, "w": tensors["w"] + 1},
        "other type": {**tensors, "step": tensors["step"].int()},
        "other shape": {**tensors, "w": tensors["w"].view(4, 3)},
        "one more": {**tensors, "more": torch.ones(1)},
        "one less": {name: tensor for name, tensor in tensors.items() if name != "half"},
        "other text": tensors,
    }[change]
    if change == "other text":
        metadata["stablekd"] = metadata["stablekd"].replace("7", "8")
    safetensors.torch.save_file(other, path, metadata)
    named = {"other type": "step", "one more": "more", "one less": "half", "other text": "metadata"}.get(change, "w")
    with pytest.raises(CheckpointError, match=f"its (tensor )?{named} "):
        load_tensors(path)


def test_the_same_tensors_are_the_same_bytes(sealed):
    path, tensors = sealed
    written = set()
    for _ in range(20):
        save_tensors(path, tensors, {"progress": {"step": 7}, "name": "ü"})
        written.add(path.read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("place", [0, 1 << 20, (2 << 20) + 8, -1])
def test_a_flipped_bit_of_a_large_tensor_is_noticed_wherever_it_is(tmp_path, place):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"w": torch.zeros(3 << 20, dtype=torch.uint8)}, {})
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + place if place >= 0 else place] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its tensor w is not what was written there"):
        load_tensors(path)


def test_a_file_is_the_one_that_safetensors_would_write(sealed):
    path, tensors = sealed
    tensors |= {"flags": torch.tensor([True]), "double": torch.ones(2, 3).double(), "ü": torch.ones(1, 2, 0)}
    tensors |= {"eight": torch.ones(3).to(torch.float8_e4m3fn), "complex": torch.ones(1, dtype=torch.complex64)}
    save_tensors(path, tensors, {"name": 'ü "quoted"\n\x7f'})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert path.read_bytes() == safetensors.torch.save(tensors, metadata)


def test_files_without_digests_are_read(sealed):
    """Those of earlier versions, and of others."""
    path, tensors = sealed
    for metadata in ({"stablekd": '{"progress": 1}'}, {"format": "pt"}, None):
        safetensors.torch.save_file(tensors, path, metadata)
        assert torch.equal(load_tensors(path)[0]["w"], tensors["w"])


def test_a_flipped_bit_in_an_exported_student_is_noticed_where_it_is_a_teacher(tmp_path):
    path, model = tmp_path / "student.safetensors", models.build("resnet20", 10, 8)
    save_tensors(path, model.state_dict(), {})
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 64
    path.write_bytes(damaged)
    with pytest.raises(ModelError, match="is not what was written there"):
        load_weights(model, path)
