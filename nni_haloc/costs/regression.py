"""Latency of the entries that were not measured, from those that were."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nni_haloc.costs.device.measurements import finished, unmeasured
from nni_haloc.costs.device.spec import Entry, Specification
from nni_haloc.costs.device.torch_runtime import layer_spec

_BLOCKS = (8, 16, 32)
"""Channels are computed in blocks: a rank of 17 may cost what 32 does."""
_BLOCKED = ((1, 1), (16, 16), (1, 16), (16, 1))
"""Blocks of input and output channels."""
_RATES = 2 + 2 * (len(_BLOCKED) + 4)
"""Columns of `_rates`."""


def complete(spec: Specification, state: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``costs.json`` with the entries that have no run predicted from those that have.

    Rates of work and traffic by non-negative least squares, and a Gaussian process for what they leave (scikit-learn). Its median relative
    error, cross-validated on what was measured, stands in the table's identity and as the spread of each predicted entry. ValueError
    where fewer than ten entries were measured.
    """
    missing = set(unmeasured(spec, state))
    homes = spec.homes()
    known = [index for index in homes if index not in missing]
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
        [float(np.median(state["runs"][homes[index][0]][homes[index][1]])) for index in known]
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # a length scale at its bound: a feature that says nothing
        guessed = cross_val_predict(
            _LatencyModel(), x, y, cv=KFold(min(10, len(known)), shuffle=True, random_state=0)
        )
        error = float(np.median(np.abs(np.exp(guessed - y) - 1)))
        found = np.exp(
            _LatencyModel()
            .fit(x, y)
            .predict(np.array([_columns(spec.entries[index]) for index in sorted(missing)]))
        )
    identity = {
        **state["identity"],
        "predicted": len(missing),
        "measured": len(known),
        "median_error": round(error, 4),
    }
    predicted = {
        index: (float(value), error) for index, value in zip(sorted(missing), found, strict=True)
    }
    return {**state, **finished(spec, {**state, "identity": identity}, predicted)}


class _LatencyModel(RegressorMixin, BaseEstimator):
    """Logarithm of the milliseconds, from the columns of `_rates` and then of `_features`."""

    def fit(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> _LatencyModel:
        amounts, features = x[:, :_RATES], x[:, _RATES:]
        found, _ = nnls(
            amounts / np.exp(y)[:, None], np.ones(len(y))
        )  # least squares of the relative error
        self.seconds_ = found + 1e-9  # nothing is for nothing
        kernel = ConstantKernel() * Matern(
            np.ones(features.shape[1]), (1e-1, 1e3), nu=1.5
        ) + WhiteKernel(1e-3)
        process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        self.rest_ = make_pipeline(StandardScaler(), process).fit(
            features, y - np.log(amounts @ self.seconds_)
        )
        return self

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log(x[:, :_RATES] @ self.seconds_) + self.rest_.predict(x[:, _RATES:])


def _columns(entry: Entry) -> list[float]:
    return _rates(entry) + _features(entry)


def _rates(entry: Entry) -> list[float]:
    """What takes time in proportion: work and traffic of the 1x1 and of the spatial factors, exact and rounded up to blocks of channels,
    the weights, and the number of calls. Scaled to be of one magnitude."""
    layer = layer_spec("", entry.layer)
    images = layer.input_shapes[0][0]
    work = layer.work(entry.rank)
    found = [1e-6 * sum(w.inputs * w.outputs * w.kernel for w in work), 1e-2 * len(work)]
    for group in ([w for w in work if w.kernel == 1], [w for w in work if w.kernel > 1]):
        for a, b in _BLOCKED:
            found.append(
                1e-9
                * images
                * sum(_up(w.inputs, a) * _up(w.outputs, b) * w.kernel * w.after for w in group)
            )
        for block in (1, 16):
            found.append(1e-6 * images * sum(_up(w.outputs, block) * w.after for w in group))
            found.append(1e-6 * images * sum(_up(w.inputs, block) * w.before for w in group))
    return found


def _features(entry: Entry) -> list[float]:
    """Work and traffic of a layer's factors, exact and rounded up to blocks of channels; the rank, and what it is a multiple of."""
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
