"""The methods of the field as CUDA graphs: the weights of their eager runs."""

import warnings
from pathlib import Path

import pytest
import torch

from stablekd_fast import models
from stablekd_fast.config import DistillConfig
from stablekd_fast.engine.checkpoint import load_tensors
from stablekd_fast.objectives import METHODS
from stablekd_fast.run.distiller import Distiller

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_gpu")]
NEED_MORE = ("multi-teacher", "fast-dfkd", "mekd", "bpr", "unkd")
CAPTURED = [
    name
    for name, own in METHODS.items()
    if own.stages == "end to end" and name not in NEED_MORE and (own.auxiliary or own.feature != "mse")
]


def trained(method, capture, out):
    settings = {"auxiliary_options": {"negatives": 64}} if method == "crd" else {}
    settings |= {"mix": "cutmix"} if method == "mix-kd" else {}
    config = DistillConfig(
        method=method, data="digits", teacher="resnet20", student="resnet20_half", epochs=1.0, subset=256,
        batch_size=32, validation=0, bn_images=32, precision="fp32", device="cuda", capture=capture,
        deterministic=True, out=str(out), **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = models.build("resnet20", 10, 8) if config.has_teacher else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the teacher knows nothing
        Distiller(config, teacher=teacher).run(progress=False)
    return load_tensors(Path(config.out) / "checkpoint.safetensors")[0]


@pytest.mark.parametrize("method", CAPTURED)
def test_a_captured_run_has_the_bits_of_an_eager_one(method, tmp_path):
    """crd draws its negatives on the device: eager and captured draws differ, so its weights need only be finite."""
    eager, graph = (trained(method, capture, tmp_path / capture) for capture in ("eager", "cudagraph"))
    names = [name for name in eager if not name.startswith("random/")]
    assert all(torch.isfinite(graph[name].double()).all() for name in names)
    if method != "crd":
        assert [name for name in names if not torch.equal(eager[name], graph[name])] == []
