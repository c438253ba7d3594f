"""WebDataset tars and TFRecords give the images and labels of the tree that they were written from."""

import io
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from stablekd_fast.data import StreamSource, TrainSource, open_dataset
from stablekd_fast.data.formats.archives import read_index
from stablekd_fast.errors import ConfigError, DataError
from tests.data.formats.packing import field, framed, varint


def example(image: bytes, label: int, packed: bool) -> bytes:
    """A tf.train.Example as TensorFlow's ImageNet script writes it, with a feature of each kind."""
    numbers = field(1, varint(label)) if packed else varint(1 << 3) + varint(label)
    features = {
        "image/filename": field(1, field(1, b"some.JPEG")),
        "image/encoded": field(1, field(1, image)),
        "image/class/label": field(3, numbers),
        "image/object/bbox/xmin": field(2, field(1, struct.pack("<2f", 0.1, 0.2))),
    }
    return field(1, b"".join(field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items()))


def write_tfrecords(path: Path, images: list[tuple[bytes, int]]) -> None:
    with open(path, "wb") as file:
        for place, image in enumerate(images):
            record = example(*image, packed=place % 2 == 0)
            file.write(framed(record))


def write_tar(path: Path, images: list[tuple[bytes, int]], labels: str) -> None:
    """`labels`: "members" beside the images, or "folders" that hold them."""
    with tarfile.open(path, "w") as archive:
        for place, (image, label) in enumerate(images):
            name = f"{place:06d}" if labels == "members" else f"class{label}/{place:06d}"
            members = {f"{name}.jpg": image} | ({f"{name}.cls": str(label).encode()} if labels == "members" else {})
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


KINDS = ("tar with members", "tar with folders", "tfrecord")


@pytest.fixture
def packed(write_large_tree, tmp_path):
    """The images of a tree packed into two archives for training and one for test; the tree's data set, and the
    folder."""

    def pack(kind: str):
        tree = open_dataset(write_large_tree(), image_size=32)
        folder = tmp_path / "packed"
        folder.mkdir()
        for part, split, shards in (("train", tree.train, 2), ("validation", tree.test, 1)):
            images = [(path.read_bytes(), label) for path, label in zip(split.paths, split.labels.tolist())]
            for shard in range(shards):
                name = f"{part}-{shard:05d}-of-{shards:05d}"
                own = images[len(images) * shard // shards : len(images) * (shard + 1) // shards]
                if kind == "tfrecord":
                    write_tfrecords(folder / name, own)
                else:
                    write_tar(folder / f"{name}.tar", own, kind.split()[-1])
        return tree, folder

    return pack


def batches(dataset, workers=2, kind="torchvision"):
    source = TrainSource(
        dataset.train,
        dataset.augmentation,
        dataset.mean,
        dataset.std,
        batch_size=4,
        seed=3,
        workers=workers,
        source=kind,
    )
    return list(source.batches(1, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_archives_give_the_same_batches_as_the_tree(packed, kind):
    tree, folder = packed(kind)
    dataset = open_dataset(folder, image_size=32)
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (len(tree.train), len(tree.test), 3)
    assert torch.equal(dataset.test.labels, tree.test.labels)
    for own, other in zip(batches(dataset), batches(tree), strict=True):
        assert torch.equal(own.sample_ids, other.sample_ids) and torch.equal(own.labels, other.labels)
        assert torch.equal(own.images, other.images)


@pytest.mark.dali
@pytest.mark.parametrize("kind", KINDS)
def test_dali_reads_archives_too(packed, kind):
    tree, folder = packed(kind)
    for own, other in zip(batches(open_dataset(folder, image_size=32), kind="dali"), batches(tree), strict=True):
        assert torch.equal(own.images, other.images)


@pytest.mark.dali
@pytest.mark.parametrize("kind", ["tar with members", "tfrecord"])
def test_indexes_made_by_dalis_own_tools_are_used(packed, kind, monkeypatch):
    _, folder = packed(kind)
    by_walking = {path: list(read_index(path)) for path in folder.iterdir()}
    tool = "tfrecord2idx" if kind == "tfrecord" else "wds2idx"
    for path in by_walking:
        index = path.with_name(path.name + ".idx") if kind == "tfrecord" else path.with_suffix(".idx")
        subprocess.run(
            [sys.executable, shutil.which(tool, path=Path(sys.executable).parent), path, index],
            check=True,
            capture_output=True,
        )
    monkeypatch.setattr("stablekd_fast.data.formats.tars._walk", None)
    assert {path: list(read_index(path)) for path in by_walking} == by_walking
    assert len(open_dataset(folder).train) == 15


@pytest.mark.parametrize("kind", ["tar with members", "tfrecord"])
def test_an_archive_cut_short_is_named(packed, kind):
    _, folder = packed(kind)
    (path,) = folder.glob("train-00001*")
    path.write_bytes(path.read_bytes()[:-7000])
    with pytest.raises(DataError, match="train-00001-of-00002"):
        dataset = open_dataset(folder, image_size=32)
        batches(dataset)


def test_a_damaged_image_of_an_archive_is_named_by_archive_and_member(packed):
    _, folder = packed("tar with members")
    (path,) = folder.glob("train-00000*")
    sample = list(read_index(path))[3]
    content = bytearray(path.read_bytes())
    content[sample.offset : sample.offset + sample.size] = bytes(sample.size)
    path.write_bytes(content)
    with pytest.raises(DataError, match="train-00000-of-00002.tar/000003.jpg: it is not an image"):
        batches(open_dataset(folder, image_size=32))
    skipping = open_dataset(folder, image_size=32, on_bad_image="skip")
    batches(skipping)
    assert [path.name for path, _ in skipping.train.skipped] == ["000003.jpg"]


def test_what_is_wrong_with_archives_is_said(packed, tmp_path):
    _, folder = packed("tar with members")
    (validation,) = folder.glob("validation*")
    content = validation.read_bytes()
    validation.unlink()
    with pytest.raises(DataError, match="none named test"):
        open_dataset(folder)
    image = (b"", 0)
    write_tar(validation, [(image[0], 7)], "members")
    with pytest.raises(DataError, match="Class 7 .* has no training images"):
        open_dataset(folder)
    with tarfile.open(validation, "w") as archive:
        archive.addfile(tarfile.TarInfo("alone.jpg"))
    with pytest.raises(DataError, match="alone.jpg has no class"):
        open_dataset(folder)
    validation.write_bytes(content)
    validation.with_suffix(".idx").write_text("v1.1 5\n")
    with pytest.raises(
        DataError, match="by its index validation-00000-of-00001.idx: an index of version v1.2 is needed"
    ):
        open_dataset(folder)
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "train-00000-of-00001").write_bytes(struct.pack("<Q", 1 << 40) + bytes(20))
    (lonely / "val-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError, match="a record at byte 0 would be 1099511627776 bytes long"):
        open_dataset(lonely)


def stream_of(dataset, split) -> StreamSource:
    return StreamSource(
        TrainSource(split, dataset.augmentation, dataset.mean, dataset.std, batch_size=3, seed=3, workers=2)
    )


@pytest.mark.dali
@pytest.mark.parametrize("kind", ["tar with members", "tar with folders"])
def test_dalis_own_reader_takes_a_subset_of_tars_and_knows_its_samples(packed, kind):
    tree, folder = packed(kind)
    dataset = open_dataset(folder, image_size=32)
    for split in (dataset.train, dataset.train.subset(9, 0), dataset.train.holdout(12, 0)[0]):
        passes = 2 * len(split) // 3
        batches = list(stream_of(dataset, split).batches(0, passes))
        ids = torch.cat([batch.sample_ids for batch in batches]).view(2, -1)
        assert torch.equal(ids.sort().values, split.sample_ids.expand(2, -1))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), tree.train.labels[ids.flatten()])


@pytest.mark.dali
def test_streamed_images_of_tars_are_those_that_their_ids_name(tmp_path):
    def gray(level: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (90, 80), (level,) * 3).save(file, "JPEG")
        return file.getvalue()

    levels = [20 * k for k in range(12)]
    for name, own in (("train-0", levels[:5]), ("train-1", levels[5:]), ("val-0", levels[:1])):
        write_tar(tmp_path / f"{name}.tar", [(gray(level), 0) for level in own], "members")
    dataset = open_dataset(tmp_path, image_size=32)
    for batch in stream_of(dataset, dataset.train).batches(0, 8):
        shown = (
            batch.images * torch.tensor(dataset.std)[:, None, None] + torch.tensor(dataset.mean)[:, None, None]
        ) * 255
        assert ((shown - torch.tensor(levels)[batch.sample_ids][:, None, None, None]).abs() <= 2).all()


@pytest.mark.dali
def test_tars_in_a_tar_and_links_are_streamed_too(packed, tmp_path):
    tree, folder = packed("tar with folders")
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as outer:
            for path in sorted(folder.glob("train*")):
                outer.add(path, f"{path.stem}.tar")
            outer.add(tree.train.paths[0], "class0/new.jpg")
            again = tarfile.TarInfo("class1/again.jpg")
            again.type, again.linkname = tarfile.LNKTYPE, "class0/new.jpg"
            outer.addfile(again)
    dataset = open_dataset(tmp_path, image_size=32)
    assert dataset.train.labels.tolist() == [*tree.train.labels.tolist(), 0, 1]
    batches = list(stream_of(dataset, dataset.train).batches(0, 17))
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert torch.equal(ids.view(3, -1).sort().values, torch.arange(17).expand(3, -1))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), dataset.train.labels[ids])


@pytest.mark.dali
def test_tfrecords_have_no_stream(packed):
    _, folder = packed("tfrecord")
    dataset = open_dataset(folder, image_size=32)
    with pytest.raises(ConfigError, match="WebDataset tars, and these are TFRecords; use auto or dali"):
        stream_of(dataset, dataset.train)
