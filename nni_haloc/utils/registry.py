"""A table of named objects that other packages can add to by an entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from nni_haloc.utils.errors import SettingsError, expected_one_of, first_line
from nni_haloc.utils.log import logger

T = TypeVar("T")


class Registry(Generic[T]):
    """Map names to objects, each imported when it is first asked for.

    A package adds an object in one of two ways: by an entry point in its metadata,

        [project.entry-points."nni_haloc.rules"]
        cheapest = "my_package.rules:cheapest"

    or, in a running program, by `register`. Our own names come first: no other package can replace
    them.

    Args:
        kind: what an entry is, for messages: ``rule``.
        group: group of the entry points: ``nni_haloc.rules``.
        own: names of this package to ``module:attribute``.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind, self.group = kind, group
        self._own = dict(own)
        self._added: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds an object under ``name``.

        Raises:
            ValueError: if the name is one of this package's own.
        """

        def add(item: T) -> T:
            if name in self._own:
                raise ValueError(f"{self.kind} {name!r}: nni-haloc already has that name")
            self._added[name] = item
            return item

        return add

    def names(self) -> list[str]:
        """Return all names: this package's, then those of others."""
        return list(dict.fromkeys([*self._own, *self._added, *self._entry_points()]))

    def own(self) -> list[str]:
        """Return the names of this package."""
        return list(self._own)

    def foreign(self) -> list[str]:
        """Return the names that other packages have added."""
        return [name for name in self.names() if name not in self._own]

    def load_foreign(self) -> dict[str, T]:
        """Return the objects of other packages by name, without those that can't be imported.

        Those are logged: one broken package does not keep the others from working.
        """
        loaded = {}
        for name in self.foreign():
            try:
                loaded[name] = self[name]
            except SettingsError as error:
                logger.warning("%s", error)
        return loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> T:
        """Return the object of a name.

        Raises:
            SettingsError: if there is no such name, or another package's object can't be imported.
        """
        if name in self._own:
            module, _, attribute = self._own[name].partition(":")
            return getattr(import_module(module), attribute)
        if name in self._added:
            return self._added[name]
        found = self._entry_points().get(name)
        if found is None:
            raise SettingsError(f"{self.kind}: {expected_one_of(self.names(), name)}")
        try:
            return found.load()
        except Exception as error:  # of the other package's own code
            where = f"{self.kind} {name!r}: the entry point {found.value} can't be loaded"
            raise SettingsError(f"{where} ({first_line(error)})") from None

    def _entry_points(self) -> dict:
        return {point.name: point for point in entry_points(group=self.group)}
