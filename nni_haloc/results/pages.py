"""Fill in HTML pages that need nothing else, and run nothing."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

_TEMPLATES = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def page(template: str, **content: Any) -> str:
    """Fill in a page.

    Args:
        template: its file in ``templates/``.
        content: what the template names.

    Returns:
        The page as HTML, which loads nothing from elsewhere.
    """
    text = _TEMPLATES.get_template(template).render(**content)
    return text.encode("utf-8", "replace").decode()  # JSON may hold halves of characters


def as_address(kind: str, content: bytes) -> str:
    """Return content as an address that holds it.

    Args:
        kind: its media type, such as ``image/svg+xml``.
        content: any bytes.
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def drawing(figure: Figure) -> str:
    """Return a figure as an address of the picture."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return as_address("image/svg+xml", buffer.getvalue())
