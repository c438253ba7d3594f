"""Data sets by name: found where they lie, and a clear word where they cannot be fetched."""

import gzip
import os
import struct
import urllib.request

import numpy as np
import pytest
from PIL import Image

from stablekd_fast.data.dataset import open_dataset
from stablekd_fast.data.formats import presets
from stablekd_fast.errors import DataError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(presets.ROOT_VARIABLE, str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


@pytest.fixture
def no_network(monkeypatch):
    """Every connection is refused at once, by a port on which nobody listens."""
    handler = urllib.request.ProxyHandler({scheme: "http://127.0.0.1:9" for scheme in ("http", "https", "ftp")})
    previous = urllib.request._opener
    urllib.request.install_opener(urllib.request.build_opener(handler))
    yield
    urllib.request.install_opener(previous)


def write_tree(folder, classes):
    for part in ("train", "val"):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            Image.fromarray(np.zeros((80, 90, 3), np.uint8)).save(folder / part / name / "0.JPEG")


def write_idx(folder):
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images, labels = np.zeros((12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))


def test_a_data_set_is_found_by_name_and_its_classes_are_readable(root):
    write_tree(root / "imagewoof" / "imagewoof2-320", ["n02086240", "n02115641"])
    dataset = open_dataset("imagewoof")
    assert dataset.classes == ["Shih-Tzu", "dingo"] and not dataset.train.resident
    write_idx(root / "fashion-mnist" / "FashionMNIST" / "raw")
    dataset = open_dataset("fashion-mnist")
    assert (dataset.name, dataset.classes[9]) == ("fashion-mnist", "ankle-boot")


def test_imagenets_thousand_classes_are_named_in_the_order_of_their_numbers():
    names = presets.class_names([f"n{1440764 + k:08d}" for k in range(1000)])
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    assert presets.class_names(["ant", "n01440764"]) == ["ant", "tench"]


def test_a_folder_of_that_name_comes_first(root, no_network):
    write_tree(root.parent / "imagenette", ["n03028079"])
    assert open_dataset("imagenette").classes == ["church"]


@pytest.mark.parametrize("name", [name for name, preset in presets.PRESETS.items() if preset.fetch])
def test_without_network_the_error_says_what_to_do_by_hand(name, root, no_network):
    with pytest.raises(DataError) as caught:
        open_dataset(name)
    message = str(caught.value)
    assert "fetching it failed" in message and str(root / name) in message and presets.ROOT_VARIABLE in message
    assert presets.PRESETS[name].by_hand in message
    assert not (root / name).exists()


@pytest.mark.parametrize(
    "name, addresses",
    [
        ("cifar10", ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]),
        ("cifar100", ["https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"]),
        ("imagenette", ["https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"]),
        ("imagewoof", ["https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz"]),
    ],
)
def test_what_is_asked_of_the_network(name, addresses, root, monkeypatch):
    """The preset asks for these addresses and no others; the network's end answers nothing."""
    asked = []

    def refuse(request, *rest, **options):
        asked.append(getattr(request, "full_url", request))
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match="no network"):
        open_dataset(name)
    assert sorted(set(asked)) == addresses


def test_imagenet_needs_an_account(root):
    with pytest.raises(DataError, match="without an account; ask for ILSVRC 2012"):
        open_dataset("imagenet")


def test_a_fetched_data_set_is_put_in_place_whole(root, monkeypatch):
    """The download itself is torchvision's; here a stand-in writes what it would."""
    fetched = []

    def fetch(folder):
        fetched.append(os.fspath(folder))
        write_tree(folder / "imagenette2-320", ["n01440764"])
        if len(fetched) == 1:
            raise RuntimeError("interrupted")

    monkeypatch.setitem(presets.PRESETS, "imagenette", presets.Preset(fetch, "by hand"))
    with pytest.raises(DataError, match="interrupted"):
        open_dataset("imagenette")
    assert not (root / "imagenette").exists()
    assert open_dataset("imagenette").classes == ["tench"]
    assert open_dataset("imagenette").classes == ["tench"] and len(fetched) == 2


def test_an_empty_folder_of_that_name_is_filled(root, monkeypatch):
    (root / "imagenette").mkdir(parents=True)
    fetch = lambda folder: write_tree(folder / "imagenette2-320", ["n01440764"])  # noqa: E731
    monkeypatch.setitem(presets.PRESETS, "imagenette", presets.Preset(fetch, "by hand"))
    assert open_dataset("imagenette").classes == ["tench"]
    assert sorted(path.name for path in root.iterdir()) == ["imagenette"]
