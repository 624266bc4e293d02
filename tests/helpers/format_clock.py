"""A runtime that knows both memory formats, and whose clock a test sets in each."""

import torch

from helpers.set_clock import FIXED, SetClock, layer_seconds
from nni_haloc.costs.device.runtime import check_options
from nni_haloc.costs.device.torch_runtime import layer_spec
from nni_haloc.space.layers import Factorised, layout_of

FORMATS = ("contiguous", "channels_last")


def formats_of(network):
    """Return the memory formats of a network's kernels, but for those that are in both."""
    kernels = [p for p in network.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    return {str(layout_of(p)).removeprefix("torch.").removesuffix("_format") for p in kernels}


class FormatClock(SetClock):
    """A set clock in two memory formats, by the factors on dense and on low-rank layers.

    Class attributes: ``dense`` and ``low`` have the factors by format, ``measured`` the formats of
    the entries and ``timed`` those of the whole networks that were timed, in order.
    """

    dense = dict.fromkeys(FORMATS, 1.0)
    low = dict.fromkeys(FORMATS, 1.0)

    def __init__(self, memory_format):
        super().__init__()
        self.memory_format = memory_format

    @classmethod
    def from_options(cls, *, memory_format="contiguous", **options):
        check_options("format_clock", memory_format=(memory_format, FORMATS))
        return cls(memory_format)

    def identity(self):
        return super().identity() | {"memory_format": self.memory_format}

    def _seconds(self, module):
        factor = self.low if isinstance(module, Factorised) else self.dense
        return factor[self.memory_format] * layer_seconds(module)

    def entry(self, spec, index):
        self.measured.append(self.memory_format)
        entry = spec.entries[index]
        seconds = self._seconds(layer_spec("", entry.layer).build(entry.rank))
        return lambda: seconds

    def network(self, spec, choice):
        assert not choice
        assert formats_of(spec.module) <= {self.memory_format}
        self.timed.append(self.memory_format)
        images = torch.zeros(spec.input)
        if self.memory_format == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            spec.module.eval()(images)
        seconds, inside = FIXED, ()
        for name, module in spec.module.named_modules():
            if isinstance(module, Factorised):
                inside += (f"{name}.",)
            if not name.startswith(inside or "\0") and (
                isinstance(module, Factorised) or not list(module.children())
            ):
                seconds += self._seconds(module)
        return lambda: seconds
