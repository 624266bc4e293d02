"""The random states of torch, numpy and Python, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return torch's, numpy's and Python's, in types that load without unpickling anything."""
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set what `random_states` has returned; on a GPU only if there are as many of them."""
    name, keys, *rest = states["numpy"]
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(states["python"])


def seed_random_states(seed: int) -> None:
    """Seed torch, numpy and Python, as Lightning does, but set no environment variables."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def isolated_random_states() -> Iterator[None]:
    """Put the random states back after a block, also after one that fails."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
