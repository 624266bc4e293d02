"""Find the state dict in a file of weights that has a network's names, whoever has renamed them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nni_haloc.utils.errors import printable

KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "net_state_dict", "net", "network",
    "module", "backbone", "weights", "params",
)  # fmt: skip
"""Keys under which training programs keep the state dict. Of several that fit the first counts."""
_WRAPPERS = {"module", "_orig_mod", "model", "net", "network", "backbone", "_forward_module", ""}
"""Attributes in which wrappers keep the network."""
_AVERAGES = {"ema", "swa", "avg", "averaged"}
"""Parts of names of a moving average of the weights."""
_IN_BETWEEN = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""What wrappers put into names, of a whole network or of a part. No layer is called so."""
_PARALLEL = re.compile(r"(?<![^.])module\.")
"""What data parallelism puts into names; a layer may be called so, too."""
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""Names of torchvision's DenseNets before 2017, in files that are still in use."""
_HEAD = re.compile(r"(?<![^.])(aux1|aux2|AuxLogits|aux_classifier)\.")
"""Auxiliary heads of torchvision's networks, which only their own training needs."""
_ADDED = {"total_ops", "total_params", "n_averaged"}
"""Buffers that counters of operations and averages of weights add to a network."""
_DEPTH, _WIDTH = 4, 100
"""How deep, and in how many entries of a list, state dicts are looked for."""
_MOST, _LONGEST = 10**5, 1000
"""Names of a state dict, and characters of one, that are looked at. ResNet-152 has 932 names."""

Renaming = Callable[[str], str]
Keys = tuple[Any, ...]
Shape = tuple[int, ...] | str | None
"""A tensor's shape; the class of another value; None of a tensor that is yet to get its shape."""


@dataclass(frozen=True)
class Fit:
    """One way to take the names of a state dict for a network's.

    Attributes:
        where: the keys that lead to the state dict.
        prefix: what the names that are taken begin with in the file alone.
        complete: makes the network's name of one of the file's that is taken.
        names: the network's name to the file's.
        missing: names that the network alone has, and can't do without.
        unexpected: names that the file alone has under the prefix.
        reshaped: names that both have, to the file's shape and the network's.
        left_out: the file's names without the prefix.
        heads: auxiliary heads that either has alone; those that the network has are untrained.
    """

    where: Keys
    prefix: str
    complete: Renaming
    names: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[Shape, Shape]]
    left_out: list[str]
    heads: dict[str, bool]

    @property
    def misfits(self) -> int:
        """The number of names that do not fit."""
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)

    @property
    def common(self) -> int:
        """The number of names that both have."""
        return len(self.names) - len(self.unexpected)

    @property
    def averaged(self) -> bool:
        """Whether the weights are a moving average, by the names that lead to them."""
        parts = [*map(str, self.where), *self.prefix.split(".")]
        return any(_AVERAGES & set(part.lower().split("_")) for part in parts)

    @property
    def rank(self) -> tuple[int, int]:
        """The lower, the plainer: known keys, one before another; then others; then averages."""
        if self.averaged:
            return 2, 0
        if not (set(self.where) <= set(KEYS) and set(self.prefix.split(".")) <= _WRAPPERS):
            return 1, 0
        return 0, min((KEYS.index(key) for key in self.where), default=-1)

    @property
    def place(self) -> str:
        """The keys and the prefix, for messages."""
        keys = "".join(f"[{key!r}]" for key in self.where)
        text = f"{keys} {self.prefix}*".lstrip() if self.prefix else keys or "the whole file"
        return printable(text, 100)


class NetworkNames:
    """A network's names and shapes, and which of them a file may lack.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        self.shapes = {name: shape_of(value) for name, value in state.items()}
        self.full = {_IN_BETWEEN.sub("", name): name for name in state}
        self.unsaved = {name for name, _ in model.named_buffers()} - set(state)
        self._tensors = {name: id(value) for name, value in state.items()}

    def prefixes(self) -> list[str]:
        """List what all names begin with: nothing, their first part, their first two, ..."""
        parts = [name.split(".")[:-1] for name in self.full]
        found = [""]
        for same in zip(*parts, strict=False):
            if len(set(same)) > 1:
                break
            found.append(f"{found[-1]}{same[0]}.")
        return found

    def missing(self, found: Collection[str]) -> list[str]:
        """List the names that a file with the names ``found`` lacks.

        It may lack counts of batches, and names of tensors that it has by another name.
        """
        there = {self._tensors.get(name) for name in found}
        return [
            name
            for name, tensor in self._tensors.items()
            if tensor not in there and not name.endswith("num_batches_tracked")
        ]


def fits(names: NetworkNames, content: Any) -> list[Fit]:
    """Compare a network's names with those of every state dict in a file.

    Args:
        names: the network's.
        content: what the file holds.
    """
    return [fit for where, state in _state_dicts(content) for fit in _fits(names, where, state)]


def at(content: Any, where: Keys) -> Any:
    """Return what stands in a file under some keys."""
    for key in where:
        content = content[key]
    return content


def shape_of(value: Any) -> Shape:
    """Return what is compared of an entry of a state dict."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return None if is_lazy(value) else tuple(value.shape)


def _state_dicts(content: Any) -> Iterator[tuple[Keys, Mapping[str, Any]]]:
    """Yield what a file holds that may be a state dict, and the keys that lead there."""
    waiting: list[tuple[Keys, Any]] = [((), content)]
    seen: set[int] = set()
    for where, value in waiting:
        if id(value) in seen or not isinstance(value, Mapping | list | tuple):
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            if len(value) < _MOST and any(isinstance(each, Tensor) for each in value.values()):
                yield where, {key: each for key, each in value.items() if isinstance(key, str)}
            entries = list(value.items())
        else:
            entries = list(enumerate(value[:_WIDTH]))
        if len(where) < _DEPTH:
            waiting += [((*where, key), inner) for key, inner in entries]


def _fits(own: NetworkNames, where: Keys, state: Mapping[str, Any]) -> Iterator[Fit]:
    """Yield the ways in which a state dict may have the network's names."""

    def plain(name: str) -> str:
        return _IN_BETWEEN.sub("", name)

    def alone(name: str) -> str:
        return _PARALLEL.sub("", plain(name))

    def newer(name: str) -> str:
        return _OLD_DENSENET.sub(r"\1\2", alone(name))

    seen: set[tuple[str, ...]] = set()
    for rename in (plain, alone, newer):
        renamed = {rename(name): name for name in state}
        if len(renamed) == len(state) and tuple(renamed) not in seen:
            seen.add(tuple(renamed))
            for shared in own.prefixes():
                tails = {name.removeprefix(shared) for name in own.full}
                for prefix in _prefixes(renamed, tails):
                    yield _compared(own, where, state, rename, shared, prefix)


def _prefixes(names: Collection[str], tails: Collection[str], most: int = 6) -> list[str]:
    """List what stands before a network's names in a file, the most frequent first.

    A network of one layer is not looked for among other layers: it would be in many places.
    """
    counts: Counter[str] = Counter()
    for name in names:
        start = 0 if len(name) < _LONGEST else -1
        while start >= 0:
            if name[start:] in tails:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    found = [prefix for prefix, _ in counts.most_common(most)]
    if not any("." in tail for tail in tails):
        found = [prefix for prefix in found if all(name.startswith(prefix) for name in names)]
    return found or [""]


def _compared(
    own: NetworkNames,
    where: Keys,
    state: Mapping[str, Any],
    rename: Renaming,
    shared: str,
    prefix: str,
) -> Fit:
    """Compare the names of a state dict under a prefix with the network's under ``shared``."""

    def complete(name: str) -> str:
        found = shared + rename(name).removeprefix(prefix)
        return own.full.get(found, found)

    taken = {complete(name): name for name in state if rename(name).startswith(prefix)}
    mine, theirs = ({_head_of(name) for name in names} for names in (own.shapes, taken))
    heads = {head: head in mine for head in (mine ^ theirs) - {""}}
    names = {
        name: full
        for name, full in taken.items()
        if name in own.shapes
        or not (_head_of(name) in heads or name in own.unsaved or name.rpartition(".")[2] in _ADDED)
    }
    return Fit(
        where,
        prefix,
        complete,
        names,
        missing=[name for name in own.missing(names) if _head_of(name) not in heads],
        unexpected=[full for name, full in names.items() if name not in own.shapes],
        reshaped={
            name: (shape_of(state[full]), own.shapes[name])
            for name, full in names.items()
            if name in own.shapes and not _same_shape(state[full], own.shapes[name])
        },
        left_out=[name for name in state if not rename(name).startswith(prefix)],
        heads=heads,
    )


def _head_of(name: str) -> str:
    """Return the auxiliary head that a name belongs to, or nothing."""
    found = _HEAD.search(name)
    return found[1] if found else ""


def _same_shape(theirs: Any, mine: Shape) -> bool:
    """Tell whether a value of a file has a network's shape."""
    if not isinstance(theirs, Tensor):
        return isinstance(mine, str)
    if mine is None:  # it takes the file's, which must have as many numbers
        return theirs.numel() * theirs.element_size() <= theirs.untyped_storage().nbytes()
    return tuple(theirs.shape) == mine or (mine == () and theirs.shape == (1,))
