"""Every command and every Python example of the documentation, run in small.

The blocks of a page run in order in one folder of their own. ```sh: each command runs; those that train or measure get
options appended that make them short. ```python: runs, with the names of the page's earlier examples. ```python FILE:
is written into that file, which a later command runs. ```sh parse-only: the settings of each `stablekd` command are
checked, the syntax of every other one.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from stablekd_fast import cli, models
from stablekd_fast.bench.runs import teacher as bench_teacher
from stablekd_fast.cli.benches import BENCHES
from stablekd_fast.cli.spelling import underscored

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TRAINING = {
    "subset": "96",
    "validation": "32",
    "batch-size": "32",
    "epochs": "1",
    "bn-images": "32",
    "precision": "fp32",
}


def write_images(folder, width, height):
    """Two classes, 64 training and 16 test images each."""
    for part, count in (("train", 64), ("test", 16)):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True)
            for k in range(count):
                pixels = np.random.default_rng(k).integers(
                    100 * label, 100 * label + 156, (height, width, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(folder / part / f"class{label}" / f"{k}.jpg")


def data_of_the_readme(folder):
    write_images(folder / "DATA", 32, 32)
    write_images(folder / "path" / "to" / "data", 32, 32)


def images_without_labels(folder):
    """Images at two depths, others with labels, and a teacher for both of their classes."""
    write_images(folder / "labelled", 80, 72)
    write_images(folder / "photos" / "summer", 80, 72)
    safetensors.torch.save_file(models.build("torchvision/resnet18", 2).state_dict(), folder / "teacher.safetensors")


STAND_INS = {
    "README": data_of_the_readme,
    "images-without-labels": images_without_labels,
    "your-data": lambda folder: write_images(folder / "photos", 80, 72),
}


def names_given():
    """What the README's example calls the reader's own."""
    return {
        "my_teacher": models.build("resnet20", 2),
        "my_student": models.build("resnet20", 2),
        "images": torch.randn(8, 3, 32, 32),
    }


@pytest.fixture
def page_folder(tmp_path, monkeypatch, one_thread):
    """A folder as a checkout has it, as far as the pages need one; benches of networks use small ones."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_teacher, "SMALL", bench_teacher.Pair("resnet14", "resnet8", 8, 16, batches=2))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_s_commands_run(page, page_folder):
    STAND_INS.get(page.stem, lambda folder: None)(page_folder)
    names = names_given()
    for kind, text in FENCE.findall(page.read_text()):
        if kind == "sh":
            for command in commands(text):
                run(command)
        elif kind == "sh parse-only":
            for command in commands(text):
                parse(command)
        elif kind == "python":
            exec(compile(text, f"{page.name}, an example", "exec"), names)
        elif kind.startswith("python "):
            (page_folder / kind.removeprefix("python ")).write_text(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_hides_in_another_kind_of_block(page):
    for kind, text in FENCE.findall(page.read_text()):
        assert kind in ("sh", "sh parse-only", "python", "yaml", "") or kind.startswith("python "), kind
        assert kind or not re.search(r"^(stablekd|python|pip|torchrun|pytest) ", text, re.MULTILINE), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_a_command_that_fails_or_does_not_exist_is_noticed(page_folder):
    with pytest.raises(AssertionError):
        run("stablekd evaluate missing.safetensors")
    with pytest.raises(AssertionError):
        run("ls missing")
    with pytest.raises(SystemExit):
        parse("stablekd distill --epoks 3")


def commands(text):
    """One string per command: lines that end in a backslash are joined, comments left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def run(command):
    words = shlex.split(command, comments=True)
    if words[0] != "stablekd":
        tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        assert subprocess.run(["bash", "-c", command], env={**os.environ, "PATH": tools}).returncode == 0, command
        return
    assert cli.main([*words[1:], *shortened(words[1:])]) == 0, command


def shortened(words):
    if words[0] == "bench":
        return BENCHES[words[1]].short
    options = TRAINING if words[0] == "distill" or words[:2] == ["cache", "build"] else {}
    if "--image-size" in words and words[0] == "distill":
        options = {**options, "image-size": "32"}
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def parse(command):
    words = shlex.split(command, comments=True)
    if words[0] != "stablekd":
        assert subprocess.run(["bash", "-nc", command]).returncode == 0, command
        return
    parser, inner = cli._parser()
    try:
        settings = parser.parse_args([underscored(word) for word in words[1:]])
    except jsonargparse.ArgumentError as error:
        raise SystemExit(f"{command}: {error}") from error
    inner[settings.command].instantiate(settings[settings.command])
