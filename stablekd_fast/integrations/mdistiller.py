"""Distillers for mdistiller (github.com/megvii-research/mdistiller). Importing this module registers them:

    import stablekd_fast.integrations.mdistiller    # the one line that its tools/train.py needs

A config then says `DISTILLER.TYPE: "StableKD"`, with settings under `StableKD` (see `DEFAULTS`), or `"FastKD"`,
`"FastDKD"`, `"FastFitNet"`, with the settings of `KD`, `DKD`, `FITNET`: the same losses under the same names, from the
fused kernels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablekd_fast import kernels
from stablekd_fast.blocks import PairedBlocks, pair_blocks
from stablekd_fast.engine.schedule import DECOMPOSED_SHARE, merge_neighbours
from stablekd_fast.errors import ConfigError
from stablekd_fast.objectives.kd import LogitKD

try:
    from mdistiller.distillers import distiller_dict
    from mdistiller.distillers._base import Distiller
    from mdistiller.distillers.DKD import DKD
    from mdistiller.distillers.FitNet import FitNet
    from mdistiller.distillers.KD import KD
    from mdistiller.engine.cfg import CFG
except ImportError as error:
    raise ConfigError(
        f"mdistiller cannot be imported ({error}); run this in a checkout of github.com/megvii-research/mdistiller, "
        "installed by its own `python3 setup.py develop`."
    ) from error

Losses = tuple[Tensor, dict[str, Tensor]]

DEFAULTS = {
    "SHARE": DECOMPOSED_SHARE,
    "CUTS": [],
    "BLOCKS": 0,
    "BRIDGE": "select",
    "TEMPERATURE": LogitKD.temperature,
    "LOSS": {"CE_WEIGHT": LogitKD.ce_weight, "KD_WEIGHT": LogitKD.kl_weight, "FEAT_WEIGHT": 1.0},
}
"""`SHARE` of `SOLVER.EPOCHS` is trained decomposed, the rest end to end. `CUTS`: modules after which both networks are
cut, or pairs (teacher's, student's); empty finds them, `BLOCKS` many, or (0) one per spatial size."""


class FastKD(KD):
    """mdistiller's KD with the fused divergence."""

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> Losses:
        student, teacher = _both_logits(self, image)
        kd = kernels.kd_loss(student, teacher, temperature=self.temperature)
        return student, _losses(self.ce_loss_weight * F.cross_entropy(student, target), self.kd_loss_weight * kd)


class FastDKD(DKD):
    """mdistiller's DKD with the fused divergence."""

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> Losses:
        student, teacher = _both_logits(self, image)
        warmth = min(kwargs["epoch"] / self.warmup, 1.0)
        dkd = kernels.decoupled_kl(
            student, teacher, target, temperature=self.temperature, alpha=self.alpha, beta=self.beta
        )
        return student, _losses(self.ce_loss_weight * F.cross_entropy(student, target), warmth * dkd)


class FastFitNet(FitNet):
    """mdistiller's FitNet with the fused squared error."""

    def forward_train(self, image: Tensor, target: Tensor, **kwargs) -> Losses:
        student, features = self.student(image)
        with torch.no_grad():
            _, hints = self.teacher(image)
        own = self.conv_reg(features["feats"][self.hint_layer])
        hint = kernels.feature_mse(own, hints["feats"][self.hint_layer])
        return student, _losses(self.ce_loss_weight * F.cross_entropy(student, target), self.feat_loss_weight * hint)


class StableKD(Distiller):
    """Blocks that train alone on the teacher's activations, later merged (StableKD: arXiv 2312.13223).

    The networks are cut at the first batch, on whose activations bridges are fitted where widths differ; bridges are
    part of the state dict, parameters are not added. While the student is decomposed, the logits returned (and the
    training accuracy) are those of its last block, which reads the teacher's activation.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg) -> None:
        super().__init__(student, teacher)
        self.settings, self.decomposed_epochs = cfg.StableKD, cfg.StableKD.SHARE * cfg.SOLVER.EPOCHS
        if not 0 <= cfg.StableKD.SHARE <= 1:
            raise ConfigError(f"StableKD.SHARE={cfg.StableKD.SHARE} was given; it must lie between 0 and 1.")
        self.paired: PairedBlocks | None = None
        self._stored_bridges: list[Tensor | None] | None = None

    def forward_train(self, image: Tensor, target: Tensor, epoch: int, **kwargs) -> Losses:
        """`epoch` counts from 1, as mdistiller's trainer does."""
        paired = self._pair(image)
        groups = merge_neighbours(len(paired))[0 if epoch - 1 < self.decomposed_epochs else -1]
        known = paired.teacher_outputs(image)
        *features, logits = paired.student_outputs(groups, image, known)
        weights = self.settings.LOSS
        kd = weights.KD_WEIGHT * kernels.kd_loss(logits, known[len(features)], temperature=self.settings.TEMPERATURE)
        for k, (feature, cut) in enumerate(zip(features, paired.cuts)):
            error = kernels.feature_mse(feature, known[k], normalize="power", channel_axis=cut.student_channel_axis)
            kd = kd + weights.FEAT_WEIGHT * error
        return logits, _losses(weights.CE_WEIGHT * F.cross_entropy(logits, target), kd)

    def get_extra_state(self) -> dict:
        if self.paired is None:
            return {"bridges": self._stored_bridges}
        return {"bridges": [None if bridge is None else bridge.weight for bridge in self.paired.bridges]}

    def set_extra_state(self, state: dict) -> None:
        self._stored_bridges, self.paired = state["bridges"], None

    def _pair(self, images: Tensor) -> PairedBlocks:
        if getattr(self, "_is_replica", False):
            raise ConfigError(
                "StableKD's blocks cannot be copied to several GPUs by DataParallel; "
                "run it on one: CUDA_VISIBLE_DEVICES=0."
            )
        if self.paired is None:
            settings = self.settings
            cuts = [(cut, cut) if isinstance(cut, str) else cut for cut in settings.CUTS]
            self.paired = pair_blocks(
                _Logits(self.teacher),
                _Logits(self.student),
                images,
                [cast(tuple[str, str], tuple(f"model.{name}" for name in cut)) for cut in cuts] or "auto",
                settings.BLOCKS or None,
                bridge=settings.BRIDGE,
            )
            for bridge, weight in zip(self.paired.bridges, self._stored_bridges or []):
                if bridge is not None and weight is not None:
                    cast(Tensor, bridge.weight).copy_(weight)
        return self.paired


class _Logits(nn.Module):
    """A network of mdistiller's, which gives logits and a dict of features, by its logits alone, as blocks need it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


def _both_logits(distiller: Distiller, image: Tensor) -> tuple[Tensor, Tensor]:
    student, _ = distiller.student(image)
    with torch.no_grad():
        teacher, _ = distiller.teacher(image)
    return student, teacher


def _losses(ce: Tensor, kd: Tensor) -> dict[str, Tensor]:
    """Return the losses under the names that mdistiller's trainers read."""
    return {"loss_ce": ce, "loss_kd": kd}


def _register() -> None:
    distiller_dict.update(StableKD=StableKD, FastKD=FastKD, FastDKD=FastDKD, FastFitNet=FastFitNet)
    node = type(CFG)
    CFG.StableKD = node({**DEFAULTS, "LOSS": node(DEFAULTS["LOSS"])})


_register()
