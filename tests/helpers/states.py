"""Comparing the states of trainings."""

import torch


def differences(a, b, where=""):
    """Everything in which two loaded checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
        yield where
