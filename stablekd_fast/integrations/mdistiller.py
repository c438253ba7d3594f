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
from stablekd_fast.blocks import PairedBlocks
from stablekd_fast.engine.schedule import DECOMPOSED_SHARE
from stablekd_fast.errors import ConfigError
from stablekd_fast.integrations.blockwise import Blockwise
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
        self.settings, self.epochs = cfg.StableKD, cfg.SOLVER.EPOCHS
        if not 0 <= cfg.StableKD.SHARE <= 1:
            raise ConfigError(f"StableKD.SHARE={cfg.StableKD.SHARE} was given; it must lie between 0 and 1.")
        self._own: list[Blockwise] = []  # in a list: its parameters are the student's, which are there already
        self._stored_bridges: list[Tensor | None] | None = None

    @property
    def paired(self) -> PairedBlocks | None:
        """The blocks; None before the first batch."""
        return self._own[0].paired if self._own else None

    def forward_train(self, image: Tensor, target: Tensor, epoch: int, **kwargs) -> Losses:
        """`epoch` counts from 1, as mdistiller's trainer does."""
        if getattr(self, "_is_replica", False):
            raise ConfigError(
                "StableKD's blocks cannot be copied to several GPUs by DataParallel; "
                "run it on one: CUDA_VISIBLE_DEVICES=0."
            )
        own = self._blockwise(image)
        if own.epoch != epoch - 1:
            own.begin(epoch - 1)
        loss, terms, logits = own(image, target)
        ce = terms.get("ce", torch.zeros_like(loss))
        return logits, _losses(ce, loss - ce)  # the trainer adds them up again

    def get_extra_state(self) -> dict:
        if self.paired is None:
            return {"bridges": self._stored_bridges}
        return {"bridges": [None if bridge is None else bridge.weight for bridge in self.paired.bridges]}

    def set_extra_state(self, state: dict) -> None:
        self._stored_bridges, self._own = state["bridges"], []

    def _blockwise(self, images: Tensor) -> Blockwise:
        if not self._own:
            settings, weights = self.settings, self.settings.LOSS
            pairs = [(cut, cut) if isinstance(cut, str) else cut for cut in settings.CUTS]
            own = Blockwise(
                _Logits(self.teacher),
                _Logits(self.student),
                images,
                self.epochs,
                cuts=[(f"model.{teacher}", f"model.{student}") for teacher, student in pairs] or "auto",
                blocks=settings.BLOCKS or None,
                bridge=settings.BRIDGE,
                share=settings.SHARE,
                feature_options={"weight": weights.FEAT_WEIGHT},
                logits_options={
                    "temperature": settings.TEMPERATURE, "kl_weight": weights.KD_WEIGHT, "ce_weight": weights.CE_WEIGHT
                },
            )  # fmt: skip
            for bridge, weight in zip(own.paired.bridges, self._stored_bridges or []):
                if bridge is not None and weight is not None:
                    cast(Tensor, bridge.weight).copy_(weight)
            self._own = [own]
        return self._own[0]


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
