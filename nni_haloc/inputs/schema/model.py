"""The section ``model``."""

from __future__ import annotations

from typing import Annotated

from nni_haloc.inputs.schema.section import Section, Words
from nni_haloc.inputs.schema.values import Arguments


class Model(Section):
    """The original network, as `nni_haloc.inputs.models.build_model` makes it."""

    name: Annotated[str, Words("name")]
    """The network: `digits_cnn`, `resnet20` or `vgg16` (for CIFAR), `torchvision:NAME`, a network
    that another package adds, or `package.module:factory`,
    [code that is run](how-to/data-and-networks.md#a-network-of-your-own)."""
    arguments: Arguments = {}
    """Keyword arguments of the factory."""
