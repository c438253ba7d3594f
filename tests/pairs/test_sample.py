"""Twelve of the pairs that were drawn: small networks, and of the larger ones some that are quick."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import json

from trial import try_pair

SAMPLE = (1, 2, 4, 5, 7, 9, 10, 13, 23, 54, 18, 64)
"""resnet, wrn, vgg, mobilenet and shufflenet for CIFAR; regnets, mobilenets; DeiT III with LeViT."""


@pytest.mark.parametrize("number", SAMPLE)
def test_a_drawn_pair_works(number):
    pair = json.loads((Path(__file__).parent / "drawn.json").read_text())[number]
    if any(name.startswith("timm/") for name in pair["networks"]):
        pytest.importorskip("timm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = try_pair(pair["networks"], pair["size"], number)
    finally:
        torch.set_num_threads(threads)
    assert found["outcome"] == "works", found
