"""The base of all sections of the settings, and how a key says what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Keys and values of the settings, checked strictly; an unknown key is refused.

    The docstring below a key is its meaning, in Markdown with links relative to ``docs/``:
    ``haloc settings`` and the reference page print it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Words:
    """What may stand in a setting, in words for the reference; it checks nothing."""

    text: str
