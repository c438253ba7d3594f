"""The ready settings are settings, and their pairs can be cut."""

from pathlib import Path

import pytest
import torch
import yaml

from stablekd_fast import models
from stablekd_fast.blocks import pair_blocks
from stablekd_fast.config import DistillConfig

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_ready_config_names_settings_and_a_pair_that_exist(path):
    config = DistillConfig(**yaml.safe_load(path.read_text()))
    size = config.image_size or 32
    networks = [models.build(name, 10, size) for name in (config.teacher, config.student)]
    paired = pair_blocks(*networks, torch.randn(2, 3, size, size))
    assert len(paired) == 5 and not any(paired.bridges)
    assert path.name in path.read_text() and path.name in (path.parent / "README.md").read_text()


def test_there_are_ready_configs():
    assert len(FILES) == 3
