"""Load trained weights from a file, without running code from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.inputs.weight_files import REMEDY, open_weights
from nni_haloc.inputs.weight_names import Fit, NetworkNames, at, fits
from nni_haloc.utils.errors import first_sentence, printable
from nni_haloc.utils.log import logger

_OTHER_NETWORK = "build the network that the file is of (model.name, model.arguments)"
_PIECE = 2**20
"""Elements that are looked at together."""
_CLASSES = 10**5
"""A shape with more outputs is no matter of classes."""
_ASKED = 3
"""Ways to take the names that modules are asked about which rename what they load."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load trained weights into ``model``, in place.

    The state dict may stand under other keys (``state_dict``, ``model``, ...), and its names may
    have a prefix that the model's lack (``module.``, ``_orig_mod.``, ``model.``, ...), or the other
    way round. If only some have the prefix, those must fit as a whole; the others are left out.
    A moving average of the weights (``ema``) is taken only where nothing else fits. Names and
    shapes are compared before a tensor takes memory. Nothing in the file is run.

    Args:
        model: the network.
        path: a file of ``torch.save`` or of safetensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it can't be loaded safely or does not fit; names the file.
    """
    path = Path(path)
    file = open_weights(path)
    fit = _choose(path, model, file.content)
    state = at(file.values(), fit.where)
    renamed = OrderedDict((name, state[full]) for name, full in fit.names.items())
    _check_values(path, model, renamed)
    vars(renamed)["_metadata"] = _metadata(model, state, fit)
    try:
        model.load_state_dict(renamed, strict=False)
    except Exception as error:  # of a module's own code
        raise ValueError(f"{path}: does not fit the model ({first_sentence(error)})") from None
    _tell(path, fit)


def _choose(path: Path, model: nn.Module, content: Any) -> Fit:
    """Return the plainest way to take a file's names for the model's.

    Raises:
        ValueError: if none fits, or several do that are equally plain; says what differs.
    """
    names = NetworkNames(model)
    found = sorted(fits(names, content), key=lambda fit: (fit.misfits, fit.rank))
    if not found:
        held = printable(_described(content), 200)
        expected = f"expected a state dict (names to tensors), found {held}"
        raise ValueError(f"{path}: {expected}; {REMEDY}")
    good = [fit for fit in found if not fit.misfits]
    if not good:
        named = [fit for fit in found[:_ASKED] if not fit.reshaped]
        good = [fit for fit in named if _fits_by_torch(model, names, content, fit)][:1]
    if not good:
        nearest = min(found, key=lambda fit: (-fit.common, fit.rank, fit.misfits))
        raise ValueError(f"{path}: does not fit the model: {_difference(nearest)}")
    plainest = [fit for fit in good if fit.rank == good[0].rank]
    if any(_taken(content, fit) != _taken(content, good[0]) for fit in plainest):
        places = " and ".join(dict.fromkeys(fit.place for fit in plainest))
        raise ValueError(f"{path}: {places} fit the model; save a file of the one to load")
    return good[0]


def _taken(content: Any, fit: Fit) -> list[Any]:
    """Return what tells apart the tensors that two ways take."""
    values = [at(content, fit.where)[name] for name in fit.names.values()]
    return [
        (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape)
        if isinstance(value, Tensor) and value.layout == torch.strided
        else id(value)
        for value in values
    ]


def _fits_by_torch(model: nn.Module, names: NetworkNames, content: Any, fit: Fit) -> bool:
    """Tell whether the model's modules themselves can make a state dict fit, by shapes alone.

    Some rename what they load, where earlier versions of them had other names.
    """
    state = at(content, fit.where)
    shapes = OrderedDict(
        (name, _without_values(value) if isinstance(value := state[full], Tensor) else value)
        for name, full in fit.names.items()
    )
    vars(shapes)["_metadata"] = _metadata(model, state, fit)
    kept = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    try:
        found = model.load_state_dict(shapes, strict=False, assign=True)
    except Exception:  # of other shapes, or of a module's own code
        return False
    finally:
        for module, parameters, buffers in kept:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
    lacking = set(found.missing_keys) & set(
        names.missing(set(names.shapes) - {*found.missing_keys})
    )
    return not lacking and not found.unexpected_keys


def _without_values(value: Tensor) -> Tensor:
    """Return a tensor of the same shape that takes no memory."""
    dtype = torch.float32 if value.is_quantized else value.dtype
    return torch.empty(value.shape, dtype=dtype, device="meta")


def _metadata(model: nn.Module, state: Any, fit: Fit) -> Mapping[str, Any]:
    """Return the versions of the modules that a state dict is of; the model's, if it has none."""
    given = getattr(state, "_metadata", None)
    if not isinstance(given, Mapping):
        return getattr(model.state_dict(), "_metadata", {})
    return {fit.complete(f"{name}." if name else "").rstrip("."): v for name, v in given.items()}


def _check_values(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Check the values of tensors that have the right names and shapes.

    Raises:
        ValueError: for a tensor that is not dense, is of another kind of numbers than the model's,
            or is not finite in the model's precision; names it.
    """
    own, learned = model.state_dict(), {name for name, _ in model.named_parameters()}
    for name, value in state.items():
        mine = own.get(name)
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            other = "quantized" if value.is_quantized else "sparse"
            found = "without values" if value.is_meta else other
            raise ValueError(f"{path}: {name}: expected a dense tensor, found one that is {found}")
        kind = mine.dtype if isinstance(mine, Tensor) else value.dtype
        more = _family(value.dtype) - _family(kind)
        if more > 0 or (more < 0 and name in learned):
            raise ValueError(f"{path}: {name}: expected numbers like {kind}, found {value.dtype}")
        if not is_finite(value, kind):
            raise ValueError(f"{path}: {name}: expected finite numbers, found NaN or infinity")


def _family(kind: torch.dtype) -> int:
    """Return 0 for integers and booleans, 1 for floating-point numbers, 2 for complex ones."""
    return 2 if kind.is_complex else 1 if kind.is_floating_point else 0


def is_finite(value: Tensor, kind: torch.dtype | None = None) -> bool:
    """Tell whether all numbers are finite in a precision, without a copy of the whole tensor.

    Args:
        value: any numbers.
        kind: the precision (None: the tensor's own).
    """
    kind = kind or value.dtype
    if not _family(kind) or not value.numel():
        return True
    rows = value if value.dim() else value[None]
    pieces = rows.split(max(1, _PIECE * len(rows) // rows.numel()))
    # Of numbers of one byte torch tells it only after they are made wider.
    wide = torch.float32 if kind.itemsize == 1 else kind
    try:
        return all(bool(torch.isfinite(piece.to(kind).to(wide)).all()) for piece in pieces)
    except NotImplementedError:  # numbers of four bits, none of which is infinite
        return True


def _difference(fit: Fit) -> str:
    """Say on one line how a state dict's names and shapes differ from the model's."""
    shapes = [
        f"{name} ({_text(theirs)} in the file, {_text(mine)} in the model)"
        for name, (theirs, mine) in fit.reshaped.items()
    ]
    parts = [
        _counted(fit.missing, "missing in the file"),
        _counted(fit.unexpected, "not in the model"),
        _counted(shapes, "of another shape"),
    ]
    text = "; ".join(part for part in parts if part)
    where = f" (of the file's part {fit.place})" if fit.where or fit.prefix else ""
    return f"{printable(text + where, 700)}; {_advice(fit) or _OTHER_NETWORK}"


def _counted(names: Sequence[str], what: str) -> str:
    shown = ", ".join(printable(name, 80) for name in names[:3])
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {what}: {shown}{more}" if names else ""


def _text(shape: Any) -> str:
    if shape is None:
        return "any shape"
    return "x".join(map(str, shape)) or "a number" if isinstance(shape, tuple) else str(shape)


def _advice(fit: Fit) -> str:
    """Return what to do about a network that seems to be built with another number of classes."""
    pairs = set()
    for theirs, mine in fit.reshaped.values():
        if not (isinstance(theirs, tuple) and isinstance(mine, tuple) and theirs and mine):
            return ""
        pairs.add((theirs[0], mine[0]) if theirs[1:] == mine[1:] else None)
    (pair,) = pairs if len(pairs) == 1 else (None,)
    if pair is None or max(pair) > _CLASSES or fit.missing or fit.unexpected:
        return ""
    remedy = f"set model.arguments, such as num_classes: {pair[0]}"
    return f"was it trained for {pair[0]} classes, and built for {pair[1]}? Then {remedy}"


def _described(content: Any) -> str:
    """Say what a file without a state dict holds."""
    if isinstance(content, Mapping):
        shown = ", ".join(map(str, list(content)[:5]))
        return f"the keys {shown}" if content else "an empty dict"
    return f"a {type(content).__name__.lstrip('_').lower()}"


def _tell(path: Path, fit: Fit) -> None:
    """Log what of the file was taken, and what was not."""
    if fit.left_out:
        tell = logger.warning if len(fit.left_out) > len(fit.names) else logger.info
        number, shown = len(fit.left_out), printable(", ".join(fit.left_out[:3]), 200)
        tell("%s: took %s; left out names of others, %d (%s)", path, fit.place, number, shown)
    if fit.averaged:
        logger.info("%s: took a moving average of the weights, %s", path, fit.place)
    for head, untrained in fit.heads.items():
        if untrained:
            remedy = "build the model without it (aux_logits: false), or load its weights, too"
            logger.warning("%s: no weights of the head %s: it is untrained; %s", path, head, remedy)
        else:
            logger.info("%s: left out the head %s, which the model is built without", path, head)
