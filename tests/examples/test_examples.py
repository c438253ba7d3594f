"""Every example runs for a few steps, in a process of its own."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import stablekd_fast
from stablekd_fast import models

EXAMPLES = Path(__file__).parents[2] / "examples"


def path_of(word: str) -> str:
    """The word itself, or the example of that name."""
    return str(EXAMPLES / word) if word.endswith(".py") and (EXAMPLES / word).exists() else word


@pytest.fixture
def run(tmp_path):
    """Run an example without the checkout's root on the path.

    Its folder `kernels` would hide a package of that name, which transformers looks for.
    """
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "stablekd_fast").symlink_to(Path(stablekd_fast.__file__).parent)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path and not Path(path, "csrc").exists()]
    environment = {**os.environ, "PYTHONPATH": ":".join([str(tmp_path / "packages"), *others]), "OMP_NUM_THREADS": "1"}

    def call(script: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *(path_of(word) for word in (script, *words))],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def check_student(folder, build):
    """The plain student was saved, and rows of the teacher."""
    build().load_state_dict(torch.load(folder / "student.pt"))
    assert any((folder / "teacher_rows").iterdir())


def resnet20():
    return models.build("resnet20", 10, 8)


def test_plain_pytorch(run, tmp_path):
    printed = run("plain_pytorch.py", "2")
    assert "Blockwise: 1.5 of 2 epochs decomposed, not begun" in printed and "epoch 1: loss " in printed
    check_student(tmp_path, resnet20)


def test_ddp(run, tmp_path):
    """Two processes by torchrun."""
    printed = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp_loop.py", "1")
    # The lines of two processes may run into each other.
    said = re.findall(r"process \d, epoch \d: loss \d", printed)
    assert sorted(line.split(":")[0] for line in said) == [f"process {k}, epoch 0" for k in (0, 1)]
    check_student(tmp_path, resnet20)


def test_accelerate(run, tmp_path):
    pytest.importorskip("accelerate")
    assert "epoch 1: loss " in run("accelerate_loop.py", "2")
    check_student(tmp_path, resnet20)


def test_sentence_embeddings(run):
    """Students learn: after one step they correlate with the teacher by 0.26 and 0.18, after 150 by 0.57 and 0.31."""
    first, *rows = run("sentence_embeddings.py", "--teacher-steps", "60", "--steps", "150", "--seeds", "1").splitlines()
    assert int(first.split()[0]) > 1000
    teacher, *students = map(json.loads, rows)
    assert teacher["nearness"] > 0.25 and len(students) == 4
    learnt = {row["loss"]: row["teacher"] for row in students if row["by"] == "teacher"}
    assert learnt["contrast"] > 0.45 and learnt["squares"] > 0.25, students


def test_one_file(run, tmp_path):
    printed = run("stablekd_in_one_file.py", "8").splitlines()
    assert [line.split(":")[0] for line in printed[2:5]] == [
        "groups [[0], [1], [2], [3]], 6 steps",
        "groups [[0, 1], [2, 3]], 1 steps",
        "groups [[0, 1, 2, 3]], 1 steps",
    ]
    trained, loaded = (line.split("accuracy ")[1] for line in printed[4:])
    assert trained == loaded and (tmp_path / "student.safetensors").exists()


def test_lightning(run, tmp_path):
    pytest.importorskip("lightning")
    assert "46 steps, last loss " in run("lightning_module.py", "2")
    check_student(tmp_path, resnet20)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert {name.split(".")[1] for name in state} == {"student", "_extra_state"}


def test_huggingface_trainer(run, tmp_path):
    pytest.importorskip("accelerate")
    if not any(Path(path, "transformers").is_dir() for path in sys.path):  # an import may find our `kernels`
        pytest.skip("transformers is not installed")
    assert "global_step=46" in run("huggingface_trainer.py", "2")
    saved = safetensors.torch.load_file(tmp_path / "checkpoints" / "checkpoint-46" / "model.safetensors")
    plain = torch.load(tmp_path / "student.pt")
    assert saved.keys() - {f"student.{name}" for name in plain} == {"_extra_state"}
    assert all(torch.equal(saved[f"student.{name}"], value) for name, value in plain.items())


@pytest.mark.parametrize("config", ["kd", "stablekd"])
def test_torchdistill(run, config, tmp_path):
    pytest.importorskip("torchdistill")
    printed = run("torchdistill/train.py", str(EXAMPLES / "torchdistill" / f"{config}.yaml"))
    assert printed.count("loss") == (4 if config == "stablekd" else 2) and "nan" not in printed
    assert (tmp_path / "student.pt").exists()
    assert (tmp_path / "teacher_rows").exists() == (config == "stablekd")


def test_timm_script(run, tmp_path):
    """As timm's own task computes, and put in its place for a script."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("timm.task", reason="this version of timm has no tasks")
    fast = runpy.run_path(str(EXAMPLES / "timm_script.py"))["FastLogitDistillationTask"]
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    results = []
    for kind in (timm.task.LogitDistillationTask, fast):
        torch.manual_seed(0)
        student, teacher = (timm.create_model("test_resnet", num_classes=10) for _ in range(2))
        task = kind(student, teacher, torch.nn.CrossEntropyLoss(), temperature=4.0, task_loss_weight=0.3)
        optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.01), []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(task.train()(images, labels)["loss"])
            losses[-1].backward()
            optimizer.step()
        results.append(torch.stack(losses).detach())
    torch.testing.assert_close(*results)
    (tmp_path / "script.py").write_text(
        "import sys, timm.task; print(timm.task.LogitDistillationTask.__name__, *sys.argv[1:])"
    )
    assert run("timm_script.py", "script.py", "DATA") == "FastLogitDistillationTask DATA\n"


def test_mdistiller():
    """The file names nothing that mdistiller's settings and ours do not have."""
    import importlib.util

    import yaml

    place = Path(__file__).parents[1] / "integrations" / "mdistiller_stub.py"
    spec = importlib.util.spec_from_file_location("mdistiller_stub", place)
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    stub.install()
    from mdistiller.distillers import distiller_dict

    from stablekd_fast.integrations import mdistiller

    class Both(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.model = models.build(name, 10, 8)

        def forward(self, images):
            return self.model(images), {"feats": []}

    content = yaml.safe_load((EXAMPLES / "mdistiller" / "stablekd_res56_res20.yaml").read_text())
    cfg = mdistiller.CFG.clone()
    for section in ("DISTILLER", "StableKD"):
        cfg.merge_from_list([word for name, value in content[section].items() for word in (f"{section}.{name}", value)])
    student, teacher = Both(cfg.DISTILLER.STUDENT), Both(cfg.DISTILLER.TEACHER)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(10, (8,))) for _ in range(2)]
    with torch.no_grad():
        [teacher.train()(images) for images, _ in batches]
    distiller = distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg)
    assert torch.isfinite(stub.train(distiller, cfg, batches, [1, 181])).all()
