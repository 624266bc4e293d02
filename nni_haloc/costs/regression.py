"""Predict the latency of entries that were not measured, from those that were.

It needs scikit-learn, which is imported when something is predicted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nni_haloc.costs.device.measured_file import finished, unmeasured
from nni_haloc.costs.device.spec import Entry, Specification
from nni_haloc.costs.device.torch_runtime import layer_spec
from nni_haloc.utils.errors import needs

_BLOCKS = (8, 16, 32)
"""Channels are computed in blocks: a rank of 17 may cost as much as one of 32."""
_BLOCKED = ((1, 1), (16, 16), (1, 16), (16, 1))
"""Blocks of input and output channels."""
_RATES = 2 + 2 * (len(_BLOCKED) + 4)
"""Columns of `_rates`."""


def check_installed() -> None:
    """Raise `MissingPackage` unless scikit-learn is installed."""
    with needs("sklearn", what="measuring a sample", install="nni-haloc[sampling]"):
        pass


def complete(spec: Specification, state: Mapping[str, Any]) -> dict[str, Any]:
    """Predict the entries that have no measured time from those that have.

    Rates of work and traffic are fitted by non-negative least squares, and a Gaussian process is
    fitted to what they leave. The median relative error, cross-validated on the measured entries,
    is in the table's identity and is the spread of each predicted entry.

    Args:
        spec: what was measured.
        state: the content of a file of measurements, of a sample of the entries.

    Returns:
        The content of a finished ``costs.json``.

    Raises:
        ValueError: if fewer than ten entries were measured, or they were measured in place.
        MissingPackage: if scikit-learn is not installed.
    """
    check_installed()
    missing = set(unmeasured(spec, state))
    users = spec.first_users()
    known = [index for index in users if index not in missing]
    if state["identity"]["where"] != "alone":
        raise ValueError(
            "layers measured in place are not predicted: measure a sample of them alone"
        )
    if len(known) < 10:
        raise ValueError(
            f"expected at least 10 measured entries to predict the others from, found {len(known)}"
        )
    if not missing:
        return {**state, **finished(spec, state)}
    x = np.array([_columns(spec.entries[index]) for index in known])
    y = np.log(
        [float(np.median(state["runs"][users[index][0]][users[index][1]])) for index in known]
    )
    error = float(np.median(np.abs(np.exp(_cross_validated(x, y) - y) - 1)))
    unknown = np.array([_columns(spec.entries[index]) for index in sorted(missing)])
    latencies = np.exp(_LatencyModel(x, y).predict(unknown))
    identity = {
        **state["identity"],
        "predicted": len(missing),
        "measured": len(known),
        "median_error": round(error, 4),
    }
    predicted = {
        index: (float(value), error)
        for index, value in zip(sorted(missing), latencies, strict=True)
    }
    return {**state, **finished(spec, {**state, "identity": identity}, predicted)}


def _cross_validated(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predict each row by a model of the other nine tenths of the rows."""
    from sklearn.model_selection import KFold

    predicted = np.empty_like(y)
    for fit, rest in KFold(min(10, len(y)), shuffle=True, random_state=0).split(x):
        predicted[rest] = _LatencyModel(x[fit], y[fit]).predict(x[rest])
    return predicted


class _LatencyModel:
    """Predicts the logarithm of the milliseconds from the columns of `_rates` and `_features`."""

    def __init__(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        from scipy.optimize import nnls
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        amounts, features = x[:, :_RATES], x[:, _RATES:]
        # Least squares of the relative error.
        seconds, _ = nnls(amounts / np.exp(y)[:, None], np.ones(len(y)))
        self.seconds = seconds + 1e-9  # nothing is free
        kernel = ConstantKernel() * Matern(
            np.ones(features.shape[1]), (1e-1, 1e3), nu=1.5
        ) + WhiteKernel(1e-3)
        process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        with warnings.catch_warnings():
            # A length scale at its bound belongs to a feature that says nothing.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.rest = make_pipeline(StandardScaler(), process).fit(
                features, y - np.log(amounts @ self.seconds)
            )

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(x[:, :_RATES] @ self.seconds) + self.rest.predict(x[:, _RATES:])


def _columns(entry: Entry) -> list[float]:
    return _rates(entry) + _features(entry)


def _rates(entry: Entry) -> list[float]:
    """Return the amounts that time is proportional to, scaled to be of one magnitude.

    They are the weights, the number of calls, and the work and traffic of the 1x1 and of the
    spatial factors, exact and rounded up to blocks of channels.
    """
    layer = layer_spec("", entry.layer)
    images = layer.input_shapes[0][0]
    work = layer.work(entry.rank)
    amounts = [1e-6 * sum(w.inputs * w.outputs * w.kernel for w in work), 1e-2 * len(work)]
    for group in ([w for w in work if w.kernel == 1], [w for w in work if w.kernel > 1]):
        for a, b in _BLOCKED:
            amounts.append(
                1e-9
                * images
                * sum(_up(w.inputs, a) * _up(w.outputs, b) * w.kernel * w.after for w in group)
            )
        for block in (1, 16):
            amounts.append(1e-6 * images * sum(_up(w.outputs, block) * w.after for w in group))
            amounts.append(1e-6 * images * sum(_up(w.inputs, block) * w.before for w in group))
    return amounts


def _features(entry: Entry) -> list[float]:
    """Return work and traffic of a layer's factors, the rank, and which blocks divide it."""
    layer = layer_spec("", entry.layer)
    images = layer.input_shapes[0][0]
    work = layer.work(entry.rank)
    rank = min(entry.rank) if entry.rank else 0

    def macs(inputs: int, outputs: int) -> float:
        return math.log(
            images
            * sum(
                _up(w.inputs, inputs) * _up(w.outputs, outputs) * w.kernel * w.after for w in work
            )
        )

    def traffic(block: int) -> float:
        return math.log(
            images
            * sum(_up(w.inputs, block) * w.before + _up(w.outputs, block) * w.after for w in work)
        )

    return [
        *(macs(block, block) for block in (1, *_BLOCKS)),
        macs(16, 1),
        macs(1, 16),
        traffic(1),
        traffic(16),
        len(work),
        rank,
        _up(rank, 16),
        *(bool(rank) and rank % block == 0 for block in _BLOCKS),
        math.log(layer.in_channels),
        math.log(layer.out_channels),
        math.log(images * work[-1].after),
        math.prod(layer.stride),
        math.prod(layer.kernel_size),
    ]


def _up(channels: int, block: int) -> int:
    return -(-channels // block) * block
