"""Runs whose training images are made: what they cannot do, the bank in place of a split, and what fills it."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.config import DistillConfig, objectives_of, synthesis_of
from stablekd_fast.data import Dataset, Split
from stablekd_fast.data.augmentation import altered
from stablekd_fast.data.bank import Bank, BankSource
from stablekd_fast.engine.synthesised import SynthesisedImages
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives import SynthesisFacts, SynthesisObjective
from stablekd_fast.run.builders import held_out_count

ALONE = ("auto", "resident")
"""Sources that read no image."""


def check_synthesis(config: DistillConfig, synthesis: SynthesisObjective, ranks: int) -> None:
    """Raise ConfigError for what cannot go together with images that are made while the run trains."""
    auxiliary = objectives_of(config).auxiliary
    remembers = auxiliary is not None and (auxiliary.kind.reads_ids or auxiliary.kind.second == "last")
    refused = {
        f"source={config.source}": (config.source not in ALONE, "reads images"),
        "a place for rows (cache.*)": (
            config.cache.keeps_rows,
            "keeps the teacher's answers, each of which is used once",
        ),
        "cache.images": (config.cache.images, "keeps images that are decoded"),
        "subset": (config.subset is not None, "chooses among images that are read"),
        "views": (config.views is not None, "shows the same views again"),
        f"mix={config.mix}": (config.mix is not None, "mixes images of the data set"),
        f"{ranks} processes": (ranks > 1, "would each have images of their own"),
        f"method={config.method}": (not config.has_teacher, "has no teacher, which the images are made from"),
        f"auxiliary={auxiliary.name if auxiliary else None}": (remembers, "remembers images from step to step"),
    }
    for given, (is_given, reason) in refused.items():
        if is_given:
            raise ConfigError(
                f"{given} was given, which {reason}; the training images are made by {synthesis.name} while the run "
                "goes on. Leave it out, or use a method that reads images."
            )


def bank_source(
    config: DistillConfig, synthesis: SynthesisObjective, dataset: Dataset, device: torch.device
) -> BankSource:
    """Return batches of a bank of images like those of the test split.

    Raises ConfigError for large images, and for a bank that holds less than a batch.
    """
    if not dataset.test.resident:
        raise ConfigError(
            f"{synthesis.name} makes small images, but those of {dataset.name} have {dataset.test.size} pixels; give "
            "an --image-size of up to 64."
        )
    if synthesis.config.bank < config.batch_size:
        raise ConfigError(
            f"bank={synthesis.config.bank} and batch_size={config.batch_size} were given; a bank must hold a batch."
        )
    height, width = dataset.test.images.shape[1:3]
    return BankSource(
        Bank(synthesis.config.bank, (int(height), int(width)), device),
        altered(dataset.augmentation, config.crop, config.augment, config.flip, jitter=config.jitter),
        dataset.mean,
        dataset.std,
        batch_size=config.batch_size,
        seed=config.seed,
        view_seed=config.view_seed,
        device=device,
    )


def held_out_images(dataset: Dataset, config: DistillConfig) -> Split | None:
    """Return the images to look at while the run trains: the data set's own validation images, else a part of the
    training images where that was asked for by another number than the default; None where there are none."""
    if not config.validation or dataset.validation is not None:
        return dataset.validation if config.validation else None
    if config.validation == DistillConfig.validation:
        warnings.warn(
            f"No images are held out: {dataset.name} has no validation images of its own, and no training image is "
            "read. --validation with a number of images takes so many of them.",
            stacklevel=1,
        )
        return None
    return dataset.train.holdout(held_out_count(config, dataset.train), config.subset_seed)[1]


def synthesised_images(
    config: DistillConfig, source: BankSource, classes: int, paired: PairedBlocks
) -> SynthesisedImages:
    """Make what fills the bank of `source`."""
    synthesis = synthesis_of(config)
    assert synthesis is not None, "there is a bank because there is a synthesis"
    height, width = source.bank.images.shape[1:3]
    modules = nn.ModuleList(paired.teacher_blocks).modules()
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    facts = SynthesisFacts(
        classes=classes,
        size=(int(height), int(width)),
        mean=source.mean,
        std=source.std,
        padding=source.augmentation.padding,
        flip=source.augmentation.flip,
        norms=[norm for norm in norms if norm.running_mean is not None],
        device=source.device,
    )
    made = synthesis.build(facts, config.seed)
    return SynthesisedImages(made, source.bank, synthesis.config, paired, config.seed)
