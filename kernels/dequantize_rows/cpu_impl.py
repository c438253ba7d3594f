from stablekd_fast.kernels.dequantize_rows.reference import *  # noqa
