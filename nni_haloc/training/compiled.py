"""Run a network's passes as one captured graph (CUDA) or one compiled program (processor)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_haloc.training.random_states import isolated_random_states
from nni_haloc.utils.errors import HalocError, first_line

_WARM_UP = 3
"""Passes before a graph is captured: libraries choose their algorithms, and memory is allocated."""


class Compiled:
    """Run a network in training, faster where its operations are small and many.

    On a CUDA device the forward and the backward pass are captured at the first call, as two graphs
    of the kernels that run without this class, and are replayed afterwards: the processor launches
    two graphs instead of hundreds of kernels. On any other device ``torch.compile`` makes a program
    of them. Inputs that are no tensors or of other shapes than the first ones, and passes in
    evaluation mode, run as ever.

    Args:
        network: a network without control flow that depends on values.
        what: names it in a message: ``the network``.
    """

    def __init__(self, network: nn.Module, what: str = "the network") -> None:
        self.network, self.what = network, what
        self._shapes: list[torch.Size] | None = None
        self._run: Callable[..., Any] = network

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run a forward pass.

        Raises:
            HalocError: if the network can't be compiled; the message has the reason.
        """
        tensors = bool(inputs) and not named and all(isinstance(x, Tensor) for x in inputs)
        if not tensors or not self.network.training:
            return self.network(*inputs, **named)
        shapes = [x.shape for x in inputs]
        if self._shapes is None:
            self._shapes = shapes
            try:
                make = _captured if inputs[0].is_cuda else _compiled
                self._run = make(self.network, inputs)
                return self._run(*inputs)
            except Exception as error:  # of the compiler, of a kernel, of the network's own code
                raise HalocError(
                    f"compile: {self.what} can't be compiled here ({first_line(error)});"
                    " set compile: false"
                ) from None
        return self._run(*inputs) if shapes == self._shapes else self.network(*inputs)


def _compiled(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    return torch.compile(network, dynamic=False)


def _captured(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Capture a forward and a backward pass; buffers and random state stay as they are."""
    samples = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in inputs)
    whole = _Whole(network)
    with torch.cuda.device(inputs[0].device), _unchanged(network.buffers()), _uncached_autocast():
        run = torch.cuda.make_graphed_callables(
            whole, samples, num_warmup_iters=_WARM_UP, allow_unused_input=True
        )
    whole.let_go()
    return run


class Replayed:
    """Call a function of tensors without gradients, on a CUDA device as one captured graph.

    Args:
        function: gives a tensor; what else it reads stays at its place in memory, and a network
            that it calls in its mode.
        kept: tensors that the function changes, and that making the graph must not: buffers, sums.
    """

    def __init__(self, function: Callable[..., Tensor], kept: Iterable[Tensor] = ()) -> None:
        self.function, self.kept = function, list(kept)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the function's result; on a CUDA device the next call overwrites it."""
        with torch.no_grad():
            if self._graph is None and inputs[0].is_cuda:
                self._capture(inputs)
            same = [x.shape for x in inputs] == [x.shape for x in self._inputs]
            if self._graph is None or not same:
                return self.function(*inputs)
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            self._graph.replay()
            return self._output

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [x.detach().clone() for x in inputs]
        with torch.cuda.device(inputs[0].device), _unchanged(self.kept), _uncached_autocast():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self.function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self._output = self.function(*self._inputs)
        self._graph = graph


class _Whole(nn.Module):
    """Keep torch, which replaces the ``forward`` of what it captures, away from the user's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._last: list[Any] = []

    def forward(self, *inputs: Tensor) -> Any:
        output = self.network(*inputs)
        self._last = tree_leaves(output)
        return output

    def let_go(self) -> None:
        """Part the captured outputs from their history.

        It would tie the parameters' gradients to the stream of the capture, and each of them would
        be waited for.
        """
        for value in self._last:
            if isinstance(value, Tensor) and value.requires_grad and not value._is_view():
                value.detach_()
        self._last = []


@contextmanager
def _unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors and the random states their values back after a block."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    with isolated_random_states():
        yield
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Enter the autocast of the moment anew, without its cache, which graphs can't have."""
    enabled = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
        yield
