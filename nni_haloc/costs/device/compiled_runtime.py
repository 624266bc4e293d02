"""Timing with torch.compile."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.costs.device.runtime import Run
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.log import logger
from nni_haloc.utils.quiet import quietly

_NUMBERS = count()


@dataclass(frozen=True)
class CompiledRuntime(TorchRuntime):
    """Time layers and networks that torch.compile has compiled for one input shape.

    Weights are constants to the compiler (its option ``freezing``), so that it folds batch
    normalisation and packs kernels, as for a network that is deployed. It needs a C++ compiler. The
    options are those of `TorchRuntime`.
    """

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for; see `TorchRuntime.identity`."""
        return {**super().identity(), "runtime": f"torch.compile {torch.__version__}"}

    def _pass_of(self, model: nn.Module, inputs: list[Tensor]) -> Run:
        """Return a compiled forward pass of a model that is ready in torch."""
        run = super()._pass_of(model, inputs)
        assert isinstance(run, FunctionType)
        # Compiled code is kept for each function's code, eight times at most, and all of it is
        # looked through in each call: every pass gets a code of its own.
        code = run.__code__.replace(co_name=f"run_{next(_NUMBERS)}")
        own = FunctionType(code, run.__globals__, None, run.__defaults__, run.__closure__)
        compiled = torch.compile(own, dynamic=False, options={"freezing": True})
        start = time.perf_counter()
        try:
            with quietly(), torch.inference_mode():
                compiled()
        except Exception as error:  # of many kinds: of the compiler, of C++, of the network's code
            raise RuntimeError(f"torch.compile: {first_line(error)}") from None
        logger.debug("torch.compile: compiled in %.1f s", time.perf_counter() - start)
        return compiled
