"""The bench of the sources on few images: all contenders make the same batches, and a wrong one shows no speed."""

import dataclasses
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from stablekd_fast.bench.core import WrongResult, check
from stablekd_fast.bench.runs.loader import Work, large_case, open_large, small_case
from stablekd_fast.cli import main
from stablekd_fast.data import open_dataset
from stablekd_fast.errors import DataError


@pytest.fixture
def photographs(tmp_path):
    """A tar of a dozen pictures in folders by class."""
    path = tmp_path / "pictures.tar"
    with tarfile.open(path, "w") as archive:
        for k in range(12):
            small = np.random.default_rng(k).integers(0, 256, (5, 6, 3), dtype=np.uint8)
            file = tmp_path / f"{k}.JPEG"
            Image.fromarray(small).resize((240 + 8 * k, 300 - 6 * k)).save(file)
            archive.add(file, f"class{k % 3}/{k}.JPEG")
    return path


def test_all_ways_to_make_batches_of_photographs_agree(photographs):
    case = large_case(Work(open_large(photographs), 4, 1, 1))
    names = {contender.name for contender in case.contenders}
    assert {
        "stablekd, torchvision",
        "torchvision DataLoader",
        "torchvision DataLoader, tensors",
        "Pillow in threads",
        "pure decode",
    } <= names
    check(case)
    (own,) = [contender for contender in case.contenders if str(contender) == "stablekd, torchvision (1 threads)"]
    wrong = dataclasses.replace(own, call=lambda: own.call().flip(3))
    with pytest.raises(WrongResult, match="stablekd, torchvision"):
        check(dataclasses.replace(case, contenders=[wrong]))


@pytest.mark.dali
def test_dali_is_among_them(photographs):
    case = large_case(Work(open_large(photographs), 4, 1, 1))
    dali = [contender for contender in case.contenders if contender.name == "stablekd, dali"]
    assert len(dali) == 2
    check(dataclasses.replace(case, contenders=dali))


@pytest.mark.dali
def test_dalis_own_readers_are_among_them_and_must_show_every_image(photographs):
    case = large_case(Work(open_large(photographs), 4, 1, 1))
    own = [contender for contender in case.contenders if contender.name == "DALI's own readers"]
    assert len(own) == 2
    check(dataclasses.replace(case, contenders=own))
    wrong = dataclasses.replace(own[0], call=lambda: own[0].call() - 1)
    with pytest.raises(WrongResult, match="DALI's own readers"):
        check(dataclasses.replace(case, contenders=[wrong]))


def test_all_ways_to_make_batches_of_small_images_agree():
    case = small_case(Work(open_dataset("digits"), 16, 1, 1))
    assert {contender.name for contender in case.contenders} == {
        "stablekd, resident",
        "torchvision DataLoader",
        "floor",
    }
    check(case)
    (own,) = [contender for contender in case.contenders if contender.role == "ours"]
    wrong = dataclasses.replace(own, call=lambda: own.call().flip(3))
    with pytest.raises(WrongResult, match="stablekd, resident"):
        check(dataclasses.replace(case, contenders=[wrong]))


def test_the_command_writes_images_per_second(tmp_path):
    assert main(["bench", "loader", "--rounds", "1", "--workers", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["contender"] for row in rows} == {"stablekd, resident", "torchvision DataLoader", "floor"}
    assert all(row["limit"] == "floor" and 0 < row["share_of_limit"] for row in rows)
    assert all(row["images_per_second"] > 0 and row["images"] >= 960 for row in rows)


def test_an_archive_without_images_is_refused(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match="holds no images"):
        open_large(tmp_path / "empty.tar")
