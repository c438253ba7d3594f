"""The Triton kernels of `batch_norm_act` and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

EXTENTS = ("rows", "channels", "length", "parts")
"""Arguments that say how a map is gone through: its rows and channels, the rows of a part, the parts."""


@triton.jit(do_not_specialize=list(EXTENTS[:3]))
def norm_moments(
    x_at,
    firsts_at,  # float32 [parts, C], means
    seconds_at,  # float32 [parts, C], summed squared deviations
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Means and summed squared deviations of COLS channels over `length` rows."""
    channels = channels // ALIGN * ALIGN
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, rows)
    lanes = tl.arange(0, ROWS)
    places, channel, _ = tile(tl.program_id(0), lanes, channels, COLS)
    mean = tl.zeros([ROWS, COLS], tl.float32)
    deviation = tl.zeros([ROWS, COLS], tl.float32)
    seen = 0.0
    for row in range(start, stop, ROWS):
        seen += 1.0
        inside = (row + lanes < stop)[:, None] & (channel < channels)[None, :]
        values = tl.load(x_at + row * channels + places, mask=inside, other=0.0).to(tl.float32)
        # Each lane keeps the moments of what it has seen (Welford 1962).
        apart = tl.where(inside, values - mean, 0.0)
        mean += apart * (1.0 / seen)
        deviation += apart * tl.where(inside, values - mean, 0.0)
    counts = ((stop - start - lanes + (ROWS - 1)) // ROWS).to(tl.float32)[:, None]
    centre = tl.sum(mean * counts, 0) / (stop - start).to(tl.float32)
    shift = mean - centre[None, :]
    spread = tl.sum(deviation + counts * shift * shift, 0)
    own = tl.program_id(1) * channels + channel
    tl.store(firsts_at + own, centre, mask=channel < channels)
    tl.store(seconds_at + own, spread, mask=channel < channels)


@triton.jit(do_not_specialize=list(EXTENTS))
def merge_norm_moments(
    firsts_at,  # float32 [parts, C]
    seconds_at,  # float32 [parts, C]
    mean_at,  # float32 [C]
    variance_at,  # float32 [C]
    running_mean_at,  # float32 [C] or None
    running_variance_at,  # float32 [C] or None
    batches_at,  # int64 [] or None
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    parts: tl.int64,
    momentum,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and variance of COLS channels, of all parts; and the running ones, if there are some."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)
    mean, variance = merged(firsts_at, seconds_at, channel, rows, channels, length, parts, PARTS)
    keep_moments(mean_at, variance_at, running_mean_at, running_variance_at, batches_at, mean, variance, channel,
                 rows, channels, momentum, tl.program_id(0) == 0)  # fmt: skip


@triton.jit(do_not_specialize=list(EXTENTS))
def norm_apply(
    x_at,
    residual_at,  # in x's dtype, or None
    y_at,
    weight_at,  # float32 [C]
    bias_at,  # float32 [C]
    firsts_at,  # float32 [parts, C], or mean and variance [C] where there are no parts
    seconds_at,
    mean_at,  # float32 [C], or None where there are no parts
    variance_at,  # float32 [C]
    running_mean_at,  # float32 [C] or None
    running_variance_at,  # float32 [C] or None
    batches_at,  # int64 [] or None
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    parts: tl.int64,
    momentum,
    eps,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ROWS rows of COLS channels of y; the first rows' program keeps the moments."""
    channels = channels // ALIGN * ALIGN
    lanes = tl.arange(0, ROWS)
    places, channel, known = tile(tl.program_id(0), lanes, channels, COLS)
    if PARTS == 1:
        mean = tl.load(firsts_at + channel, mask=known, other=0.0)
        variance = tl.load(seconds_at + channel, mask=known, other=0.0)
    else:
        mean, variance = merged(firsts_at, seconds_at, channel, rows, channels, length, parts, PARTS)
        if tl.program_id(1) == 0:
            keep_moments(mean_at, variance_at, running_mean_at, running_variance_at, batches_at, mean, variance,
                         channel, rows, channels, momentum, tl.program_id(0) == 0)  # fmt: skip
    scale = tl.load(weight_at + channel, mask=known, other=0.0) * tl.rsqrt(variance + eps)
    bias = tl.load(bias_at + channel, mask=known, other=0.0)
    row = tl.program_id(1).to(tl.int64) * ROWS
    inside = (row + lanes < rows)[:, None] & known[None, :]
    here = row * channels + places
    y = (tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    if residual_at is not None:
        y += tl.load(residual_at + here, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_at + here, y.to(y_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=list(EXTENTS[:3]))
def norm_gradient_sums(
    gradient_at,
    x_at,
    y_at,  # in x's dtype, or None where x says where the ReLU let through
    weight_at,  # float32 [C]
    bias_at,  # float32 [C]
    mean_at,  # float32 [C]
    variance_at,  # float32 [C]
    firsts_at,  # float32 [parts, C], sums of the gradient
    seconds_at,  # float32 [parts, C], sums of its products with the normalised x
    rows: tl.int64,
    channels: tl.int64,
    length: tl.int64,
    eps,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What `length` rows contribute to the gradients with respect to bias and weight of COLS channels."""
    channels = channels // ALIGN * ALIGN
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, rows)
    lanes = tl.arange(0, ROWS)
    places, channel, known = tile(tl.program_id(0), lanes, channels, COLS)
    mean, deviation, scale, bias = normalisation(mean_at, variance_at, weight_at, bias_at, channel, known, eps)
    plain = tl.zeros([ROWS, COLS], tl.float32)
    weighted = tl.zeros([ROWS, COLS], tl.float32)
    for row in range(start, stop, ROWS):
        inside = (row + lanes < stop)[:, None] & known[None, :]
        here = row * channels + places
        centred = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        passed = incoming(gradient_at, y_at, here, inside, centred, scale[None, :], bias[None, :], RELU)
        plain += passed
        weighted += passed * centred
    own = tl.program_id(1) * channels + channel
    tl.store(firsts_at + own, tl.sum(plain, 0), mask=known)
    tl.store(seconds_at + own, tl.sum(weighted, 0) * deviation, mask=known)


@triton.jit(do_not_specialize=["channels", "parts"])
def merge_norm_gradient_sums(
    firsts_at,  # float32 [parts, C]
    seconds_at,  # float32 [parts, C]
    bias_gradient_at,  # float32 [C]
    weight_gradient_at,  # float32 [C]
    channels: tl.int64,
    parts: tl.int64,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The sums of COLS channels over all parts."""
    channel = tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = channel < channels
    tl.store(bias_gradient_at + channel, summed(firsts_at, channel, channels, parts, PARTS), mask=known)
    tl.store(weight_gradient_at + channel, summed(seconds_at, channel, channels, parts, PARTS), mask=known)


@triton.jit(do_not_specialize=["rows", "channels", "parts"])
def norm_gradient(
    gradient_at,
    x_at,
    y_at,  # in x's dtype, or None where x says where the ReLU let through
    x_gradient_at,
    residual_gradient_at,  # in x's dtype, or None
    weight_at,  # float32 [C]
    bias_at,  # float32 [C]
    mean_at,  # float32 [C]
    variance_at,  # float32 [C]
    firsts_at,  # float32 [parts, C]: of bias and weight, sums of parts; or gradients [C] where there are no parts
    seconds_at,
    bias_gradient_at,  # float32 [C], or None where there are no parts
    weight_gradient_at,  # float32 [C], or None where there are no parts
    rows: tl.int64,
    channels: tl.int64,
    parts: tl.int64,
    eps,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """ROWS rows of COLS channels of the gradients with respect to x and the residual."""
    channels = channels // ALIGN * ALIGN
    lanes = tl.arange(0, ROWS)
    places, channel, known = tile(tl.program_id(0), lanes, channels, COLS)
    if PARTS == 1:
        plain = tl.load(firsts_at + channel, mask=known, other=0.0)
        weighted = tl.load(seconds_at + channel, mask=known, other=0.0)
    else:
        plain = summed(firsts_at, channel, channels, parts, PARTS)
        weighted = summed(seconds_at, channel, channels, parts, PARTS)
        if tl.program_id(1) == 0:
            tl.store(bias_gradient_at + channel, plain, mask=known)
            tl.store(weight_gradient_at + channel, weighted, mask=known)
    mean, deviation, scale, bias = normalisation(mean_at, variance_at, weight_at, bias_at, channel, known, eps)
    row = tl.program_id(1).to(tl.int64) * ROWS
    inside = (row + lanes < rows)[:, None] & known[None, :]
    here = row * channels + places
    count = rows.to(tl.float32)
    centred = tl.load(x_at + here, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    passed = incoming(gradient_at, y_at, here, inside, centred, scale[None, :], bias[None, :], RELU)
    normalised = centred * deviation[None, :]
    found = (passed - (plain / count)[None, :] - normalised * (weighted / count)[None, :]) * scale[None, :]
    tl.store(x_gradient_at + here, found.to(x_gradient_at.dtype.element_ty), mask=inside)
    if residual_gradient_at is not None:
        tl.store(residual_gradient_at + here, passed.to(residual_gradient_at.dtype.element_ty), mask=inside)


@triton.jit
def tile(column, lanes, channels, COLS: tl.constexpr):
    """Where the elements of a tile lie, from the first of its rows on; its channels, and which of them there are."""
    channel = column * COLS + tl.arange(0, COLS)
    places = lanes[:, None] * channels.to(tl.int32) + channel[None, :]
    return places, channel, channel < channels


@triton.jit
def normalisation(mean_at, variance_at, weight_at, bias_at, channel, known, eps):
    """Mean, 1 / deviation, scale and bias of channels: x becomes (x - mean) * scale + bias."""
    mean = tl.load(mean_at + channel, mask=known, other=0.0)
    deviation = tl.rsqrt(tl.load(variance_at + channel, mask=known, other=1.0) + eps)
    scale = tl.load(weight_at + channel, mask=known, other=0.0) * deviation
    return mean, deviation, scale, tl.load(bias_at + channel, mask=known, other=0.0)


@triton.jit
def merged(firsts_at, seconds_at, channel, rows, channels, length, parts, PARTS: tl.constexpr):
    """Mean and variance over all parts (Chan, Golub, LeVeque 1979), PARTS of them at a time."""
    mean = tl.zeros([channel.shape[0]], tl.float32)
    deviation = tl.zeros([channel.shape[0]], tl.float32)
    seen = 0.0
    for first in range(0, parts, PARTS):
        part, places, inside = parts_of(first, channel, channels, parts, PARTS)
        counts = tl.where(part < parts, tl.minimum(length, rows - part * length), 0).to(tl.float32)[:, None]
        centres = tl.load(firsts_at + places, mask=inside, other=0.0)
        spreads = tl.load(seconds_at + places, mask=inside, other=0.0)
        added = tl.minimum(rows, (first + PARTS) * length).to(tl.float32) - seen
        centre = tl.sum(centres * counts, 0) / added
        apart = centres - centre[None, :]
        spread = tl.sum(spreads + counts * apart * apart, 0)
        share = added / (seen + added)
        shift = centre - mean
        mean += shift * share
        deviation += spread + shift * shift * (seen * share)
        seen += added
    return mean, deviation / rows.to(tl.float32)


@triton.jit
def summed(sums_at, channel, channels, parts, PARTS: tl.constexpr):
    """Sums over all parts, PARTS of them at a time."""
    total = tl.zeros([channel.shape[0]], tl.float32)
    for first in range(0, parts, PARTS):
        _, places, inside = parts_of(first, channel, channels, parts, PARTS)
        total += tl.sum(tl.load(sums_at + places, mask=inside, other=0.0), 0)
    return total


@triton.jit
def parts_of(first, channel, channels, parts, PARTS: tl.constexpr):
    """PARTS parts, where their values of some channels lie, and which there are."""
    part = first + tl.arange(0, PARTS)
    places = part[:, None] * channels + channel[None, :]
    return part, places, (part < parts)[:, None] & (channel < channels)[None, :]


@triton.jit
def keep_moments(mean_at, variance_at, running_mean_at, running_variance_at, batches_at, mean, variance, channel, rows,
                 channels, momentum, counts):  # fmt: skip
    """Write a batch's mean and variance, and bring the running ones up to date as torch does: the variance unbiased."""
    known = channel < channels
    tl.store(mean_at + channel, mean, mask=known)
    tl.store(variance_at + channel, variance, mask=known)
    if running_mean_at is not None:
        before = tl.load(running_mean_at + channel, mask=known, other=0.0)
        tl.store(running_mean_at + channel, before * (1.0 - momentum) + mean * momentum, mask=known)
        unbiased = variance * (rows.to(tl.float32) / (rows - 1).to(tl.float32))
        before = tl.load(running_variance_at + channel, mask=known, other=0.0)
        tl.store(running_variance_at + channel, before * (1.0 - momentum) + unbiased * momentum, mask=known)
    if batches_at is not None and counts:
        tl.store(batches_at, tl.load(batches_at) + 1)


@triton.jit
def incoming(gradient_at, y_at, here, inside, centred, scale, bias, RELU: tl.constexpr):
    """The gradient behind the ReLU: nothing comes through where y, or what it was made of, is not above zero."""
    passed = tl.load(gradient_at + here, mask=inside, other=0.0).to(tl.float32)
    if y_at is not None:
        passed = tl.where(tl.load(y_at + here, mask=inside, other=0.0).to(tl.float32) > 0, passed, 0.0)
    elif RELU:
        passed = tl.where(centred * scale + bias > 0, passed, 0.0)
    return passed
