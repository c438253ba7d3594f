from stablekd_fast.kernels.feature_cosine.reference import *  # noqa
