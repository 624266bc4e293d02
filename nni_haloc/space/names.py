"""Candidates and their names: ``dense``, ``r16``, ``r16x8``."""

from __future__ import annotations

import re
from typing import Any

from nni_haloc.inputs.options import Kind
from nni_haloc.utils.errors import brief

DENSE = "dense"


Rank = tuple[int, ...] | None
"""``(r1, r2)`` of a Tucker-2 layer (output, input), ``(r,)`` of a low-rank matrix, None: dense."""


def rank_name(rank: Rank) -> str:
    """Return a candidate's name: ``dense``, ``r16``, or ``r16x8`` if r1 and r2 differ.

    >>> rank_name((16, 16)), rank_name((16, 8)), rank_name(None)
    ('r16', 'r16x8', 'dense')
    """
    if rank is None:
        return DENSE
    return f"r{rank[0]}" if len(set(rank)) == 1 else f"r{rank[0]}x{rank[1]}"


def parse_rank(name: str, kind: Kind) -> Rank:
    """Return the rank of a candidate's name.

    Raises:
        ValueError: if it is no such name.
    """
    if name == DENSE:
        return None
    match = re.fullmatch(r"r([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?", name)
    if not match or (match[2] and kind != "conv"):
        raise ValueError(
            f"expected {DENSE!r}, 'r16'{' or r16x8' if kind == 'conv' else ''}, found {brief(name)}"
        )
    first = int(match[1])
    return (first, int(match[2] or first)) if kind == "conv" else (first,)


def is_rank(value: Any) -> bool:
    """Tell whether a value is one or two positive integers."""
    return (
        isinstance(value, (list, tuple))
        and 1 <= len(value) <= 2
        and all(type(r) is int and r > 0 for r in value)
    )
