"""Tries the Python readers with made-up input, by `atheris`, which looks for input that reaches new lines of them.

    python tests/fuzz/readers.py TARGET [--seconds N] [--runs N] [--corpus FOLDER]
    python tests/fuzz/readers.py all [--seconds N] [--runs N] [--corpus FOLDER]

`all` tries each target in a process of its own, N seconds each, and keeps their inputs in folders of FOLDER.

An input is a finding if anything but an error of this project comes out, or if it takes more than ten seconds or 2 GiB.
Findings are kept in the folder that is named, and become tests once they are mended.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is needed, which this Python does not have: pip install atheris (CPython 3.8 to 3.13, Linux).")

with atheris.instrument_imports(include=["stablekd_fast.data", "stablekd_fast.files", "stablekd_fast.cache"]):
    import numpy as np
    import torch

    from stablekd_fast.cache.manifest import MANIFEST, Manifest, _digest
    from stablekd_fast.cache.shard import Part
    from stablekd_fast.cache.store import RowStore
    from stablekd_fast.data import open_dataset
    from stablekd_fast.data.pixels import decode_rgb
    from stablekd_fast.engine.checkpoint import load_tensors, save_tensors
    from stablekd_fast.errors import StableKDError
    from stablekd_fast.files.checksums import masked_crc32c
    from stablekd_fast.files.pickles import array_of, load_recorded, load_torch
    from stablekd_fast.models.weights import load_weights
    from stablekd_fast.report import read_results
    from stablekd_fast.report.events import read_events

Target = Callable[[bytes], object]


def folder_of(name: str) -> Path:
    """A folder in memory, where there is one, for the file of a target."""
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    return Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=place))


def of_data_set(
    name: str,
    beside: dict[str, bytes],
    place: str = "",
    fit: Callable[[bytes], bytes] = bytes,
    seed: bytes | None = None,
) -> Callable[[], tuple[Target, list[bytes]]]:
    """A target whose bytes are one file of a data set; `beside` are the files that it needs, itself among them. With
    `fit` the bytes, of which `seed` is one, become such a file: checksums would refuse nearly all others."""

    def make() -> tuple[Target, list[bytes]]:
        folder = folder_of("data")
        for other, content in beside.items():
            (folder / other).write_bytes(content)

        def target(data: bytes) -> None:
            (folder / name).write_bytes(fit(data))
            found = open_dataset(folder / place if place else folder)
            assert len(found.train.images) == len(found.train)

        return target, [beside[name] if seed is None else seed]

    return make


def idx_files() -> dict[str, bytes]:
    """MNIST's four files, of 2 images of 4 x 4 pixels."""
    images = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (2, 4, 4)) + bytes(32)
    labels = (0x801).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes((0, 1))
    return {
        f"{part}-{kind}-ubyte": images if "3" in kind else labels
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    }


def npz_file() -> bytes:
    file, images = io.BytesIO(), np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(file, x_train=images, y_train=np.arange(2), x_test=images, y_test=np.arange(2))
    return file.getvalue()


def tar_file() -> bytes:
    from PIL import Image

    image, file = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(2):
            for ending, content in (("png", image.getvalue()), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def tfrecord_file() -> bytes:
    sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
    from small_files import tfrecords

    folder = folder_of("records")
    return tfrecords(folder)[1].read_bytes()


def of_records(data: bytes) -> bytes:
    """A TFRecord file of one record, whose checksums are right."""
    length = struct.pack("<Q", len(data))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, data))


def summed(data: bytes) -> bytes:
    """A tar whose headers have the right sums: the blocks that have a sum's blanks where one ends."""
    tar = bytearray(data)
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 154 : at + 156] == b"\0 ":
            tar[at + 148 : at + 156] = b" " * 8
            tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


def with_array(data: bytes) -> bytes:
    """An npz whose x_train is these bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz_file())) as whole, zipfile.ZipFile(file, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, data if name == "x_train.npy" else whole.read(name))
    return file.getvalue()


def array_file() -> bytes:
    with zipfile.ZipFile(io.BytesIO(npz_file())) as whole:
        return whole.read("x_train.npy")


def image() -> tuple[Target, list[bytes]]:
    """An encoded image of any format."""
    from PIL import Image

    picture, seeds = Image.effect_noise((12, 9), 50).convert("RGB"), []
    for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA"):
        file = io.BytesIO()
        picture.save(file, kind)
        seeds.append(file.getvalue())

    def target(data: bytes) -> None:
        decode_rgb(data, Path("some.tga"))

    return target, seeds


def cifar_files() -> dict[str, bytes]:
    import pickle

    batch = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}, 2)
    return {"train": batch, "test": batch, "meta": pickle.dumps({"fine_label_names": ["a", "b"]}, 2)}


def pickled() -> tuple[Target, list[bytes]]:
    def target(data: bytes) -> None:
        try:
            found = load_recorded(io.BytesIO(data))
            if isinstance(found, dict):
                array_of(found.get("data"))
        except MemoryError:
            raise
        except Exception as error:  # `load_recorded` promises no error of its own; its callers turn them into theirs
            raise StableKDError(str(error)) from error

    return target, list(cifar_files().values())


def torch_file() -> tuple[Target, list[bytes]]:
    path, file = folder_of("torch") / "weights.pt", io.BytesIO()
    model = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), file)

    def target(data: bytes) -> None:
        path.write_bytes(data)
        load_weights(model, path)

    assert load_torch is not None
    return target, [file.getvalue()]


def checkpoint() -> tuple[Target, list[bytes]]:
    path = folder_of("checkpoint") / "checkpoint.safetensors"
    save_tensors(path, {"a": torch.ones(3), "b": torch.zeros(2, 2)}, {"step": 1})

    def target(data: bytes) -> None:
        path.write_bytes(data)
        load_tensors(path)

    return target, [path.read_bytes()]


def manifest_with(rows: int) -> Manifest:
    return Manifest((Part("x", torch.float32, (2,)),), rows, {"teacher": "t"})


def manifest() -> tuple[Target, list[bytes]]:
    """The bytes are the manifest but for its digest, which is made to fit: otherwise it alone would refuse them."""
    folder = folder_of("manifest")
    with RowStore(folder, manifest_with(4), write=True, threads=1) as store:
        store.put(torch.arange(4), [torch.ones(4, 2)])
    content = json.loads((folder / MANIFEST).read_text())
    content.pop("digest")

    def target(data: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError):
            changed = json.loads(data)
            if isinstance(changed, dict):
                data = json.dumps({**changed, "digest": _digest(changed)}).encode()
        (folder / MANIFEST).write_bytes(data)
        with RowStore(folder, threads=1) as store:
            store.verify()

    return target, [json.dumps(content).encode()]


def shard() -> tuple[Target, list[bytes]]:
    """The bytes are a half-filled shard, which a writer takes up."""
    folder = folder_of("shard")
    with RowStore(folder, manifest_with(4), write=True, threads=1) as store:
        store.put(torch.arange(2), [torch.ones(2, 2)])
    path = next(folder.glob(".shard-*"))
    content = path.read_bytes()

    def target(data: bytes) -> None:
        path.write_bytes(data)
        for left in folder.glob("shard-*"):
            left.unlink()
        manifest_with(4).save(folder)
        with RowStore(folder, manifest_with(4), write=True, threads=1) as store:
            rows = torch.arange(8)
            found = store.gather(rows[store.present(rows)])[0]
            assert torch.equal(found, torch.ones_like(found)), "a row is served that was never written"

    return target, [content]


def events() -> tuple[Target, list[bytes]]:
    folder = folder_of("events")

    def target(data: bytes) -> None:
        (folder / "events.jsonl").write_bytes(data)
        read_events(folder)

    return target, [b'{"kind": "run_start", "time": 1.0, "step": 0}\n{"kind": "train", "time": 2.0, "step": 5}\n']


def results() -> tuple[Target, list[bytes]]:
    path = folder_of("results") / "results.json"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        read_results(path)

    return target, [b'{"runs": [{"method": "kd", "seed": 0, "accuracy": 0.5, "epochs": 1, "steps": 2}]}']


def config() -> tuple[Target, list[bytes]]:
    from stablekd_fast import cli

    path = folder_of("config") / "run.yaml"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = cli.main(["distill", "--config", str(path), "--data", "/nowhere/at/all"])
        assert code == 2 and "Traceback" not in said.getvalue(), said.getvalue()[-300:]

    return target, [b"method: kd\nepochs: 2\noptimizer:\n  lr: 0.1\n"]


TARGETS: dict[str, Callable[[], tuple[Target, list[bytes]]]] = {
    "idx": of_data_set("train-images-idx3-ubyte", idx_files()),
    "npz": of_data_set("own.npz", {"own.npz": npz_file()}, "own.npz"),
    "tar": of_data_set("train.tar", {"train.tar": tar_file(), "val.tar": tar_file()}),
    "tfrecord": of_data_set(
        "train-00000-of-00001", dict.fromkeys(("train-00000-of-00001", "validation-00000-of-00001"), tfrecord_file())
    ),
    "record": of_data_set(
        "train-00000-of-00001",
        dict.fromkeys(("train-00000-of-00001", "validation-00000-of-00001"), tfrecord_file()),
        fit=of_records,
        seed=tfrecord_file()[12 : 12 + int.from_bytes(tfrecord_file()[:8], "little")],
    ),
    "header": of_data_set("train.tar", {"train.tar": tar_file(), "val.tar": tar_file()}, fit=summed),
    "array": of_data_set("own.npz", {"own.npz": npz_file()}, "own.npz", with_array, array_file()),
    "idx.gz": of_data_set(
        "train-images-idx3-ubyte.gz",
        {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()},
        fit=gzip.compress,
        seed=idx_files()["train-images-idx3-ubyte"],
    ),
    "cifar": of_data_set("train", cifar_files()),
    "cifar.tar.gz": of_data_set("c.tar.gz", {"c.tar.gz": gzip.compress(tar_file())}, "c.tar.gz"),
    "image": image, "pickle": pickled, "torch": torch_file, "checkpoint": checkpoint, "manifest": manifest,
    "shard": shard, "events": events, "results": results, "config": config,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1)
    parser.add_argument("--corpus", type=Path, help="folder of inputs, gone on with and added to")
    asked = parser.parse_args()
    if asked.target == "all":
        sys.exit(max(_in_a_process(name, asked) for name in TARGETS))
    target, seeds = TARGETS[asked.target]()
    corpus = asked.corpus or Path(tempfile.mkdtemp(prefix="corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    findings = Path(tempfile.mkdtemp(prefix=f"findings-{asked.target}-"))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def tried(data: bytes) -> None:
        with contextlib.suppress(StableKDError):
            target(data)

    limits = [f"-max_total_time={asked.seconds}", f"-runs={asked.runs}", "-timeout=10", "-rss_limit_mb=3000"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={findings}/", "-print_final_stats=1", str(corpus)], tried)
    atheris.Fuzz()


def _in_a_process(name: str, asked: argparse.Namespace) -> int:
    command = [sys.executable, __file__, name, "--seconds", str(asked.seconds), "--runs", str(asked.runs)]
    if asked.corpus is not None:
        command += ["--corpus", str(asked.corpus / name)]
    ended = subprocess.run(command, capture_output=True, text=True)
    counts = [line.split()[-1] for line in ended.stderr.splitlines() if "number_of_executed_units" in line]
    print(
        f"{name}: {counts[-1] if counts else 'no'} inputs, {'a finding' if ended.returncode else '0 findings'}",
        flush=True,
    )
    if ended.returncode:
        print(ended.stdout[-2000:] + ended.stderr[-2000:])
    return int(ended.returncode != 0)


if __name__ == "__main__":
    main()
