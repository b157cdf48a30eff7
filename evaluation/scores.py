import numpy as np

CONSTANT_SPREAD = 1e-7


def is_constant(shares):
    return (np.ptp(shares, axis=0) < CONSTANT_SPREAD) & (len(shares) > 1)
