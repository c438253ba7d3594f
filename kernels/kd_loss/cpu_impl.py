from stablekd_fast.kernels.kd_loss.reference import *  # noqa
