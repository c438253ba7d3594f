"""The validation images of ILSVRC 2012 get their classes from files beside their tar."""

import io
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from stablekd_fast.data import open_dataset
from stablekd_fast.errors import DataError
from tests.data.formats.packing import picture_bytes, tar_bytes, write_tar

IDS = {1: "n02", 2: "n03", 3: "n01"}
"""ILSVRC's numbers are not in the order of the names."""
TRUTH = [2, 3, 1, 3]
CLASSES = [IDS[number] for number in TRUTH]
KIT = "ILSVRC2012_devkit_t12"


def image_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def truth_file() -> bytes:
    return "".join(f"{number}\n" for number in TRUTH).encode()


def meta_file() -> bytes:
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = [(number, name, f"name of {name}", 0) for number, name in IDS.items()]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array([*synsets, (1001, "n99", "all of them", 3)], kinds)}, do_compression=True)
    return file.getvalue()


@pytest.fixture
def originals(tmp_path):
    """The two tars as they are fetched, which have no classes for validation."""
    write_tar(
        tmp_path / "ILSVRC2012_img_train.tar",
        {f"{name}.tar": tar_bytes([(f"{name}_{k}.JPEG", picture_bytes(k)) for k in range(3)]) for name in IDS.values()},
    )
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", {image_name(k): picture_bytes(k) for k in range(1, len(TRUTH) + 1)})
    return tmp_path


def validation_classes(folder) -> list[str]:
    dataset = open_dataset(folder)
    assert dataset.classes == sorted(IDS.values()) and len(dataset.train) == 9
    return [dataset.classes[label] for label in dataset.test.labels.tolist()]


def test_without_classes_the_files_that_give_them_are_named(originals):
    with pytest.raises(DataError, match=f"None of the 4 images in .*_val.tar has a class.*{KIT}.*val_annotations"):
        open_dataset(originals)


def test_the_development_kit_gives_them_as_it_is(originals):
    with tarfile.open(originals / f"{KIT}.tar.gz", "w:gz") as archive:
        for name, content in (("ILSVRC2012_validation_ground_truth.txt", truth_file()), ("meta.mat", meta_file())):
            info = tarfile.TarInfo(f"{KIT}/data/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert validation_classes(originals) == CLASSES


@pytest.mark.parametrize("inside", ["", "data", f"{KIT}/data"])
def test_the_development_kit_may_be_unpacked(originals, inside):
    (originals / inside).mkdir(parents=True, exist_ok=True)
    (originals / inside / "ILSVRC2012_validation_ground_truth.txt").write_bytes(truth_file())
    with pytest.raises(DataError, match=r"numbers the classes in an order of its own: put meta.mat"):
        open_dataset(originals)
    (originals / inside / "meta.mat").write_bytes(meta_file())
    assert validation_classes(originals) == CLASSES


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("val_annotations.txt", "{image}\t{label}\t0\t0\t62\t62"),
        ("val.txt", "{image} {label}"),
        ("val.txt", "val/{image} {label}"),
        ("LOC_val_solution.csv", "{stem},{label} 85 1 499 272"),
        ("valprep.sh", "mv {image} {label}/"),
    ],
)
def test_a_list_of_images_and_classes_gives_them(originals, name, line):
    listed = [(image_name(k), label) for k, label in enumerate(CLASSES, 1)]
    lines = [line.format(image=image, stem=image[:-5], label=label) for image, label in listed]
    (originals / name).write_text("ImageId,PredictionString\n#!/bin/bash\n\n" + "\n".join(lines[:0:-1]))
    assert validation_classes(originals) == CLASSES[1:]
    assert open_dataset(originals).test.records.left_out == {"no class": 1}


@pytest.mark.parametrize(
    ("truth", "meta", "said"),
    [
        (b"2\n5\n", meta_file(), "it names no class of number 5"),
        (b"two\n", meta_file(), "invalid literal"),
        (truth_file(), b"no matrix", "truncated"),
    ],
)
def test_a_damaged_kit_is_named(originals, truth, meta, said):
    (originals / "ILSVRC2012_validation_ground_truth.txt").write_bytes(truth)
    (originals / "meta.mat").write_bytes(meta)
    with pytest.raises(DataError, match=f"Cannot read the ground truth in {originals}.*{said}"):
        open_dataset(originals)


def test_a_kit_without_its_files_and_a_list_that_is_no_text_are_named(originals):
    (originals / f"{KIT}.tar.gz").write_bytes(tar_bytes([("readme.txt", b"")]))
    with pytest.raises(DataError, match="it holds no ILSVRC2012_validation_ground_truth.txt"):
        open_dataset(originals)
    (originals / "val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"Cannot read the classes in .*val.txt"):
        open_dataset(originals)


def test_the_tars_do_not_count_beside_the_tree_that_they_were_unpacked_to(originals, write_tree):
    write_tree(root=originals, test_folder="val")
    assert open_dataset(originals).classes == ["ant", "bee", "cat"]


def test_tars_of_other_tasks_are_no_part(originals):
    (originals / "val_annotations.txt").write_text("\n".join(f"{image_name(k)} n01" for k in range(1, 5)))
    write_tar(originals / "ILSVRC2012_img_train_t3.tar", {"n01.tar": tar_bytes([("n01_0.JPEG", picture_bytes())])})
    write_tar(originals / "ILSVRC2012_img_test_v10102019.tar", {"ILSVRC2012_test_00000001.JPEG": picture_bytes()})
    dataset = open_dataset(originals)
    assert (len(dataset.train), len(dataset.test)) == (9, 4)
