"""Convolutions of every geometry."""

import itertools

from torch import nn

GEOMETRIES = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d, "padding_mode": m, "bias": b}
    for k, s, p, d, m, b in itertools.product(
        [3, (1, 5)],
        [1, (2, 1)],
        [0, (1, 2), "same"],
        [1, 2],
        ["zeros", "reflect", "circular", "replicate"],
        [True, False],
    )
    if not (p == "same" and s != 1)
]


def convolution(geometry, c=4, f=5):
    return nn.Conv2d(c, f, **geometry).double()
