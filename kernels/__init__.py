"""Operators for distillation: mathematics, tensors in, tensors out.

Each operator lives in a folder of its own: the public function with its schema, `reference.py`, which says readably
what is computed, `cpu_impl.py`, which calls the C++ core, and `triton_impl.py` for NVIDIA GPUs. They are registered
with `torch.library` in the namespace `stablekd`, and torch's dispatcher chooses the implementation by device. One
(`attention_transfer`) is a composition of torch's own operators instead.
"""

if __name__ == "kernels":
    raise ImportError(
        "The operators were imported as top-level `kernels`, which would register them twice; "
        "use `import stablekd_fast.kernels`."
    )

from stablekd_fast.kernels._registry import implementations
from stablekd_fast.kernels.attention_transfer import attention_transfer, attention_transfer_with_grad
from stablekd_fast.kernels.augment_batch import augment_batch
from stablekd_fast.kernels.batch_norm_act import batch_norm_act
from stablekd_fast.kernels.conv_act import conv_act
from stablekd_fast.kernels.correlation import correlation, correlation_with_grad
from stablekd_fast.kernels.decoupled_kl import decoupled_kl, decoupled_kl_with_grad
from stablekd_fast.kernels.dequantize_rows import dequantize_rows
from stablekd_fast.kernels.feature_cosine import feature_cosine, feature_cosine_with_grad
from stablekd_fast.kernels.feature_mse import feature_mse, feature_mse_with_grad
from stablekd_fast.kernels.grouped_kl import grouped_kl, grouped_kl_with_grad
from stablekd_fast.kernels.kd_loss import kd_loss, kd_loss_with_grad
from stablekd_fast.kernels.quantize_rows import quantize_rows
from stablekd_fast.kernels.standardised_kd_loss import standardised_kd_loss, standardised_kd_loss_with_grad

__all__ = [
    "attention_transfer",
    "attention_transfer_with_grad",
    "augment_batch",
    "batch_norm_act",
    "conv_act",
    "correlation",
    "correlation_with_grad",
    "decoupled_kl",
    "decoupled_kl_with_grad",
    "dequantize_rows",
    "feature_cosine",
    "feature_cosine_with_grad",
    "feature_mse",
    "feature_mse_with_grad",
    "grouped_kl",
    "grouped_kl_with_grad",
    "implementations",
    "kd_loss",
    "kd_loss_with_grad",
    "quantize_rows",
    "standardised_kd_loss",
    "standardised_kd_loss_with_grad",
]
