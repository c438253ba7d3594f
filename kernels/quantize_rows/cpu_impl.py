from stablekd_fast.kernels.quantize_rows.reference import *  # noqa
