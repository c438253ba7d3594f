from stablekd_fast.kernels.feature_mse.reference import *  # noqa
