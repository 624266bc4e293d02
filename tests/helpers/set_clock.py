"""A runtime whose clock a test sets: no pass is run, and each takes what the test says."""

from itertools import count

from torch import nn

from nni_haloc.costs.device.runtime import Runtime
from nni_haloc.space.layers import Factorised
from nni_haloc.utils.versions import processor

FIXED = 2e-3
"""Seconds that a network takes beside its layers."""


def layer_seconds(module):
    """Return a layer's seconds by its number of weights: a microsecond each."""
    return 1e-6 * sum(p.numel() for p in module.parameters() if p.dim() > 1)


class SetClock(Runtime):
    """A runtime whose passes take as long as the network has weights.

    Class attributes set it wrong: ``low_rank`` is the factor on layers of low rank of which cost
    tables know nothing, and ``disturbed(i)`` the factor on the i-th pass.
    """

    low_rank = 1.0
    disturbed = staticmethod(lambda i: 1.0)

    def __init__(self):
        self.passes = count()

    @classmethod
    def from_options(cls, **options):
        return cls()

    def identity(self):
        facts = {"dtype": "float32", "memory_format": "contiguous", "threads": 1}
        return {"runtime": "set clock", "device": processor(), **facts}

    def network(self, spec, choice):
        assert not choice
        seconds, factorised = FIXED, []
        for name, module in spec.module.named_modules():
            if isinstance(module, Factorised):
                factorised.append(f"{name}.")
                seconds += self.low_rank * layer_seconds(module)
            elif isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith(
                tuple(factorised)
            ):
                seconds += layer_seconds(module)
        return lambda: seconds

    def once(self, run):
        return run() * self.disturbed(next(self.passes))
