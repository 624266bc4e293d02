"""The fields of the settings' schema, read off pydantic's classes."""

from typing import get_args

from nni_haloc.inputs.config import Config


def fields(section=Config, place=()):
    """Yield every dotted key of the settings and its field, sections and what is in them."""
    for name, field in section.model_fields.items():
        yield (*place, name), field
        for kind in (field.annotation, *get_args(field.annotation)):
            if hasattr(kind, "model_fields"):
                yield from fields(kind, (*place, name))


FIELDS = dict(fields())
