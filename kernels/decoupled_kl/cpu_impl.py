from stablekd_fast.kernels.decoupled_kl.reference import *  # noqa
