"""The machine's measured limits: plausible, and in the units they claim."""

import torch

from tandem.ops import roofline

CPU = torch.device("cpu")


def test_bandwidth_is_that_of_memory():
    # Anything that runs torch reads between 0.2 GB/s and what caches of a big server give.
    assert 2e8 < roofline.read_bandwidth(2**24, CPU) < 1e13


def test_matmul_rate_is_that_of_the_linear_layer():
    rate = roofline.matmul_rate(torch.float32, CPU, tokens=32)
    assert 1e8 < rate < 1e15
