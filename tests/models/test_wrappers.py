"""Networks as others wrap them."""

import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from stablekd_fast import distill, models
from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.errors import CutError, ModelError
from stablekd_fast.models.wrappers import unwrapped
from tests.processes import Forked

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    torch.manual_seed(seed)
    return models.build("resnet8", 10)


def halves(seed=0):
    """A network one part of which is compiled."""
    model = network(seed)
    model.layer2 = torch.compile(model.layer2)
    return model


def in_place(seed=0):
    model = network(seed)
    model.compile()
    return model


@pytest.mark.parametrize(
    "wrap",
    [DataParallel, torch.compile, lambda net: DataParallel(torch.compile(net)), nn.Sequential, None, "in place"],
    ids=["DataParallel", "compile", "both", "Sequential", "a part compiled", "compiled in place"],
)
def test_what_is_wrapped_around_is_no_part_of_a_block(wrap):
    plain, student = network(1), network(1)
    wrapped = halves(1) if wrap is None else in_place(1) if wrap == "in place" else wrap(student)
    paired = pair_blocks(network(2).eval(), wrapped, IMAGES)
    assert len(paired) == 4
    blocks = nn.Sequential(*paired.student_blocks).eval()
    assert torch.equal(blocks(IMAGES), plain.eval()(IMAGES))
    inside = {id(parameter) for parameter in wrapped.parameters()}
    assert {id(parameter) for parameter in blocks.parameters()} == inside


def test_a_wrapped_student_is_trained_and_exported_under_its_own_names(tmp_path):
    student = DataParallel(network(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distill(
            data="digits", teacher=DataParallel(network(2)), student=student, subset=64, epochs=4, batch_size=32,
            validation=0.0, out=tmp_path / "run", progress=False,
        )  # fmt: skip
    fresh = network(3)
    models.load_weights(fresh, tmp_path / "run" / "student.safetensors")
    assert torch.equal(fresh.conv1.weight, student.module.conv1.weight)
    uncut = PairedBlocks.uncut(torch.compile(network(4)), DataParallel(network(5)))
    assert type(uncut.student).__name__ == type(network()).__name__


RANKS = """
import sys, torch
from torch import nn, distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from stablekd_fast import models, pair_blocks
from stablekd_fast.errors import RankError, ModelError

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
teacher, student = models.build("resnet8", 10).eval(), models.build("resnet8", 10)
ddp = DDP(student)
images = torch.randn(4, 3, 32, 32)
paired = pair_blocks(teacher, ddp, images)
assert paired.student is student
torch.manual_seed(rank)
images = torch.randn(4, 3, 32, 32)
known = paired.teacher_outputs(images)
groups = [[k] for k in range(len(paired))]


def loss(outputs):
    return sum((ours - theirs).square().mean() for ours, theirs in zip(outputs, known.values()))


try:
    paired.student_outputs(groups, images, known)
except RankError as error:
    assert "leave gradients on their rank" in str(error), error
else:
    raise AssertionError("gradients stay on their rank, and nobody said so")
with torch.no_grad():
    paired.student_outputs(groups, images, known)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = student

    def forward(self, images, known):
        return paired.student_outputs(groups, images, known)


def alike(gradient):
    both = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(both, gradient)
    return torch.equal(*both)


student = models.build("resnet8", 10)
paired = pair_blocks(teacher, student, images)
known = paired.teacher_outputs(images)
wrapped = DDP(Blocks())
loss(wrapped(images, known)).backward()
assert all(alike(parameter.grad) for parameter in student.parameters())
paired.averages_gradients = True
paired.student_outputs(groups, images, known)

from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
sharded = fully_shard(models.build("resnet8", 10), mesh=init_device_mesh("cpu", (2,)))
try:
    pair_blocks(teacher, sharded, images)
except ModelError as error:
    assert "sharded" in str(error), error
else:
    raise AssertionError("a sharded network was cut")
print("all is well")
dist.destroy_process_group()
"""


def test_gradients_of_blocks_do_not_stay_on_their_rank_in_silence(tmp_path):
    code, environment = textwrap.dedent(RANKS), {"OMP_NUM_THREADS": "1"}
    processes = [Forked("-c", code, rank, tmp_path / "meeting", environment=environment) for rank in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "all is well" in output, output


def test_a_sharded_network_is_refused_by_name():
    class FullyShardedDataParallel(nn.Module):
        """Named as torch's, which needs several GPUs."""

    with pytest.raises(ModelError, match="parameters of Sequential are sharded \\(FullyShardedDataParallel\\)"):
        unwrapped(nn.Sequential(FullyShardedDataParallel()))


HUGGING_FACE = {
    "ViT": {"hidden_size": 24, "intermediate_size": 48},
    "Dinov2": {"hidden_size": 24},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "Swin": {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4},
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_networks_of_hugging_face_are_cut_and_give_their_logits(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 4, "num_attention_heads": 4}
    own = HUGGING_FACE[name] if name in ("ResNet", "Swin") else sizes | HUGGING_FACE[name]
    if name == "Swin":
        own = {"image_size": 32, "patch_size": 2} | own
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=10, **own)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    paired = pair_blocks(model, network(), IMAGES)
    assert len(paired) >= 3
    torch.testing.assert_close(paired.teacher_outputs(IMAGES)[len(paired) - 1], model(IMAGES).logits)


def test_a_script_teaches_without_being_cut(tmp_path):
    teacher = torch.jit.trace(network(2).eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(CutError, match="the teacher has none.*kd and ce need no cuts"):
        pair_blocks(teacher, network(1), IMAGES[..., :8, :8])
    with pytest.warns(UserWarning, match="networks are not cut, which kd does not need"):
        distill(
            data="digits", teacher=teacher, student=network(1), method="kd", subset=64, epochs=2, batch_size=32,
            validation=0.0, out=tmp_path / "run", progress=False,
        )  # fmt: skip
