"""Words that settings, commands and Python functions take alike, each list in one place."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["step", "onecycle", "constant"]
"""How a learning rate falls; see `nni_haloc.training.recipe.Recipe`."""
Ranks = Literal["keep", "prune"]
"""What pruning does with ranks; see `nni_haloc.chain.pruning.prune`."""
SparsitySchedule = Literal["none", "linear", "agp"]
"""How sparsity rises while pruning; see `nni_haloc.chain.pruning.prune`."""
Decomposition = Literal["warm_hooi", "hosvd", "hooi", "data"]
"""Ways to decompose a kernel; see `nni_haloc.space.tucker.decompose`."""
Kind = Literal["conv", "pointwise", "linear"]
"""Kinds of layers: spatial convolutions, 1x1 convolutions, linear layers."""
MemoryFormat = Literal["contiguous", "channels_last"]
"""How torch lays tensors out in memory."""
Precision = Literal["float32", "int8"]
"""Number formats in which runs measure latency and energy."""
FormatSetting = Literal["auto", "contiguous", "channels_last"]
"""The memory format that is asked for; ``auto`` leaves it to a measurement."""
LamSchedule = Literal["constant", "linear", "cosine"]
"""How Eq. (9)'s lambda falls over the search; see `nni_haloc.search.objective.schedule`."""

MOST_PROCESSES = 1024
"""The most processes, or threads of one; torch ends the program where the system refuses them."""
