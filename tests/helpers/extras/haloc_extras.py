"""A package of somebody else's that adds a rule, a runtime, a network and a data set by name."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.runtime import Runtime
from nni_haloc.costs.device.torch_runtime import layer_spec
from nni_haloc.inputs.data import Splits


def cheapest(problem):
    """Choose the cheapest candidate of every layer."""
    return {
        layer: min(row, key=lambda name: problem.cost(layer, name))
        for layer, row in problem.candidates.items()
    }


class Counting(Runtime):
    """A device that takes a nanosecond for each multiply-accumulate."""

    @classmethod
    def from_options(
        cls, *, device="cpu", dtype="float32", memory_format="contiguous", threads=None
    ):
        if device != "cpu":
            raise ValueError(f"device: the counting runtime has no {device}")
        return cls()

    def identity(self):
        return {
            "runtime": "counting 1",
            "device": "none",
            "dtype": "float32",
            "memory_format": "contiguous",
            "threads": 1,
        }

    def entry(self, spec, index):
        entry = spec.entries[index]
        layer = layer_spec("", entry.layer)
        (shape,) = layer.input_shapes
        return self._pass(layer.build(entry.rank), shape)

    def network(self, spec, choice):
        assert not choice, "it measures layers alone"
        return self._pass(spec.module, spec.input)

    def once(self, run):
        return run()

    @staticmethod
    def _pass(network, shape):
        seconds = 1e-9 * shape[0] * count_macs(network, torch.zeros(1, *shape[1:]))
        return lambda: seconds


def tiny(width=8):
    """Make a network for images of 8x8."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 2),
    )


def stripes(settings):
    """Make images of stripes, which lie or stand."""
    generator = torch.Generator().manual_seed(settings.seed)

    def split(number):
        images = torch.randn(number, 3, 8, 8, generator=generator)
        labels = torch.arange(number) % 2
        waves = settings.arguments.get("height", 1.0) * torch.tensor([1.0, -1.0] * 4)
        images += torch.where(labels[:, None, None, None] > 0, waves, waves[:, None])
        return TensorDataset(images, labels)

    train = split(64)
    return Splits(train, train, split(32), split(32), ["lying", "standing"])
