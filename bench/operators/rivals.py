"""The operators as people write them in plain PyTorch: losses for autograd, and codecs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE, ALPHA = 4.0, 0.9
DECOUPLED_ALPHA, DECOUPLED_BETA = 1.0, 8.0
THRESHOLD = 0.9
STANDARDISED_WEIGHT = 9.0


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    divergence = F.kl_div(log_q, p, reduction="batchmean")
    return ALPHA * TEMPERATURE**2 * divergence + (1 - ALPHA) * F.cross_entropy(student, labels)


def decoupled_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    own = F.one_hot(labels, student.shape[1]).to(torch.bool)
    q, p = F.softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    target = F.kl_div(_label_or_not(q, labels).log(), _label_or_not(p, labels), reduction="batchmean")
    log_q_others = F.log_softmax((student / TEMPERATURE).masked_fill(own, -1000.0), dim=1)
    p_others = F.softmax((teacher / TEMPERATURE).masked_fill(own, -1000.0), dim=1)
    others = F.kl_div(log_q_others, p_others, reduction="batchmean")
    return TEMPERATURE**2 * (DECOUPLED_ALPHA * target + DECOUPLED_BETA * others)


def _label_or_not(probabilities: Tensor, labels: Tensor) -> Tensor:
    label = probabilities.gather(1, labels[:, None])
    return torch.cat([label, 1 - label], dim=1)


def grouped_kl(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = F.softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    ordered, classes = p.sort(dim=1, descending=True)
    primary = torch.zeros_like(p).scatter(1, classes, (ordered.cumsum(1) - ordered < THRESHOLD).to(p.dtype)).bool()
    masses = [torch.stack([(x * primary).sum(1), (x * ~primary).sum(1)], 1) for x in (q, p)]
    binary = F.kl_div(masses[0].log(), masses[1], reduction="batchmean")
    log_q = F.log_softmax((student / TEMPERATURE).masked_fill(~primary, -1000.0), dim=1)
    inner = F.softmax((teacher / TEMPERATURE).masked_fill(~primary, -1000.0), dim=1)
    within = (masses[1][:, 0] * F.kl_div(log_q, inner, reduction="none").sum(1)).mean()
    return TEMPERATURE**2 * (binary + within)


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of DIST, with the operations that its authors' code takes."""
    q, p = F.softmax(student, dim=1), F.softmax(teacher, dim=1)
    apart = [
        1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8).mean()
        for a, b in ((q, p), (q.t(), p.t()))
    ]
    return apart[0] + apart[1]


def standardised_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the loss with the operations that its authors' code takes."""
    a, b = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (student, teacher))
    return STANDARDISED_WEIGHT * kd_term(a, b) + F.cross_entropy(student, labels)


def kd_term(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence, with the operations that mdistiller's KD takes for it."""
    log_q, p = F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * TEMPERATURE**2


def dkd_term(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the decoupled divergence, with the operations that mdistiller's DKD takes for it.

    They are masks, sums under them, and logits of the label lowered by 1000.
    """
    own = torch.zeros_like(student).scatter_(1, labels[:, None], 1).bool()
    rest = torch.ones_like(student).scatter_(1, labels[:, None], 0).bool()
    q, p = F.softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    q, p = (torch.cat([(x * mask).sum(1, keepdim=True) for mask in (own, rest)], dim=1) for x in (q, p))
    target = F.kl_div(q.log(), p, reduction="sum") * TEMPERATURE**2 / len(labels)
    p_others = F.softmax(teacher / TEMPERATURE - 1000.0 * own, dim=1)
    log_q_others = F.log_softmax(student / TEMPERATURE - 1000.0 * own, dim=1)
    others = F.kl_div(log_q_others, p_others, reduction="sum") * TEMPERATURE**2 / len(labels)
    return DECOUPLED_ALPHA * target + DECOUPLED_BETA * others


def mse(student: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(student, target)


def power_mse(student: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(student, target) / target.square().mean()


def scaled_mse(student: Tensor, target: Tensor, power: Tensor) -> Tensor:
    return F.mse_loss(student, target) / power


def channel_mse(student: Tensor, target: Tensor) -> Tensor:
    deviation = (target.var(dim=(0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    return ((student - target) / deviation).square().mean()


def l2_mse(student: Tensor, target: Tensor) -> Tensor:
    student, target = F.normalize(rows(student)), F.normalize(rows(target))
    return (student - target).square().sum(dim=1).mean()


def coded_mse(student: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return F.mse_loss(student, dequantize(codes, scales, student.dtype))


def position_cosine(student: Tensor, target: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(student, target, dim=1)).mean()


def sample_cosine(student: Tensor, target: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(rows(student), rows(target), dim=1)).mean()


def attention_transfer(student: Tensor, target: Tensor) -> Tensor:
    """Return the loss with the operations of the authors' code."""
    maps = [F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, target)]
    return (maps[0] - maps[1]).pow(2).mean()


def quantize(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = 127.0 if dtype == torch.int8 else 448.0
    scales = values.abs().amax(dim=(2, 3)).float() / largest
    codes = values / scales[:, :, None, None]
    if dtype == torch.int8:
        codes = codes.round()
    return codes.clamp(-largest, largest).to(dtype), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.to(scales.dtype) * scales[:, :, None, None]).to(dtype)


def rows(features: Tensor) -> Tensor:
    """Flatten `[N, C, H, W]` to `[N, elements]` in the order of memory, so that neither format pays for a copy."""
    if features.is_contiguous():
        return features.flatten(1)
    return features.permute(0, 2, 3, 1).flatten(1)


def augment(
    images: Tensor, rows: Tensor, offsets: Tensor, flips: Tensor, padding: int, mean: Tensor, std: Tensor
) -> Tensor:
    """Pad, crop and flip each sample by indexing, and normalise in the dtype of `mean`."""
    height, width = images.shape[1:3]
    padded = F.pad(images[rows], (0, 0, padding, padding, padding, padding))
    down = offsets[:, :1] + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    across = offsets[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    sample = torch.arange(len(rows), device=images.device)[:, None, None]
    crops = padded[sample, down[:, :, None], across[:, None, :]]
    return ((crops.to(mean.dtype) / 255 - mean) / std).permute(0, 3, 1, 2)
