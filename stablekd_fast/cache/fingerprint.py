"""What a stored row depends on. Rows are used again only where all of it is the same."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap

import PIL
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.blocks.bridge import Bridge
from stablekd_fast.data import TrainSource
from stablekd_fast.data.views import VIEW_VERSION


def prefix_digests(paired: PairedBlocks) -> list[str]:
    """For each teacher block, a digest of the computation from the images to its end: weights, buffers, operations.

    A digest does not depend on earlier cuts: `layer2` ends the same prefix, whether there is a cut at `layer1` or not.
    """
    digests, state, operations = [], {}, []
    for k, block in enumerate(paired.teacher_blocks):
        lead = "" if isinstance(block, fx.GraphModule) else f"block{k}."
        state |= {lead + name: digest_of(tensor) for name, tensor in block.state_dict().items()}
        operations += _operations(block)
        digests.append(_digest([sorted(state.items()), operations]))
    return digests


def digest_of(tensor: Tensor) -> str:
    """A digest of a tensor's shape, dtype and values."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    head = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return hashlib.blake2b(values, digest_size=16, person=hashlib.blake2b(head, digest_size=16).digest()).hexdigest()


def image_fingerprint(source: TrainSource) -> dict:
    """What the uint8 images of a source's views depend on, as JSON types."""
    split, augmentation = source.split, source.augmentation
    facts = {
        "data": split.identity(),
        "view": {
            "version": VIEW_VERSION,
            "seed": source.view_seed,
            "kind": augmentation.kind,
            "flip": augmentation.flip,
            "padding": augmentation.padding,
            "size": augmentation.size,
        },
    }
    if augmentation.jitter:
        facts["view"]["jitter"] = augmentation.jitter
    if augmentation.scaled_decode:
        facts["view"]["scaled_decode"] = True
    for name in ("scale", "ratio", "interpolation", "operations", "magnitude", "erasing"):
        value = getattr(augmentation, name)
        if value != type(augmentation).__dataclass_fields__[name].default:
            facts["view"][name] = list(value) if isinstance(value, tuple) else value
    if augmentation.mix:  # partners are drawn from the images that are trained on
        members = hashlib.blake2b(split.sample_ids.numpy().data, digest_size=16).hexdigest()
        facts["view"] |= {"mix": augmentation.mix, "mix_alpha": augmentation.mix_alpha, "among": members}
    if split.decoded:
        facts["decoder"] = {
            "pillow": PIL.__version__,
            "torchvision": torchvision.__version__,
            "torch": torch.__version__,
        }
        facts["crop_size"] = split.crop_size
    if source.decoder is not None:
        facts["decoder"] |= source.decoder.identity()
    return facts


def teacher_fingerprint(paired: PairedBlocks, source: TrainSource, device: torch.device) -> list[dict]:
    """What the teacher's output at each cut (bridged) and its logits depend on, as JSON types, one entry each."""
    common = {
        **image_fingerprint(source),
        "normalisation": {"mean": list(source.mean), "std": list(source.std)},
        "batch_size": source.batch_size,
        "precision": paired.precision.name,
        "device": _device(device),
        "torch": torch.__version__,
    }
    if paired.folded:
        common["folded"] = True
    return [
        {**common, "teacher": prefix, "bridge": bridge_digest(paired.bridge_after(k))}
        for k, prefix in enumerate(prefix_digests(paired))
    ]


def bridge_digest(bridge: Bridge | None) -> str | None:
    """A digest of what a bridge computes; None without one."""
    if bridge is None:
        return None
    weight = None if bridge.weight is None else digest_of(bridge.weight)
    places = [] if bridge.places is None else [bridge.places.extra_repr()]
    return _digest([weight, bridge.teacher_axis, bridge.student_axis, *places])


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _operations(block: nn.Module) -> list:
    """What a block computes, apart from its tensors: operations, settings of modules, sources of those not of torch."""
    if not isinstance(block, fx.GraphModule):
        return [[repr(block), _sources(block)]]
    listed = []
    for node in block.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        listed.append([node.op, getattr(node.target, "__name__", str(node.target)), _plain_arguments(node)])
        if node.op == "call_module":
            module = block.get_submodule(node.target)
            listed.append([repr(module), _sources(module)])
    return listed


def _plain_arguments(node: fx.Node) -> str:
    """The node's arguments as text, without results of other nodes."""
    return str(map_arg((node.args, node.kwargs), lambda other: None))


def _sources(module: nn.Module) -> list[str]:
    kinds = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    texts = []
    for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
        try:
            texts.append(_code_of(inspect.getsource(kind)))
        except (OSError, TypeError):
            texts.append(kind.__qualname__)  # its source is not at hand
    return texts


def _code_of(source: str) -> str:
    """What a class's source computes: its syntax tree in one spelling, without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                setattr(node, block, [one for one in statements if not _is_docstring(one)])
    return ast.unparse(tree)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _digest(content) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
