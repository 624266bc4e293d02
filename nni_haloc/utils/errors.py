"""The errors that users of the package can catch, each with a message of one line.

`HalocError` is the base. Bad arguments of a Python function raise plain ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class HalocError(ValueError):
    """Something that the user can mend. The message is one line: what, where, the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class SettingsError(HalocError):
    """A setting, an option or a file of settings is wrong; the message names key and file."""


class DataError(HalocError):
    """Images, labels or classes are missing or damaged, or do not fit the network."""


class InfeasibleBudget(HalocError):
    """No network of the rank space fits the budget; the message names the cheapest cost.

    Attributes:
        fact: the message without the remedy.
        costs: the `CostTable` that the budget is in, which need not be measured again; None where
            several budgets exclude each other.
        least: the cost of the cheapest network, in the table's unit.
        first: whether it is the budget itself that can't be met, not a further one of ``also``.
        run: the number of the run that it is of, where several are checked.
    """

    run: int | None = None

    def __init__(
        self,
        fact: str,
        remedy: str = "",
        *,
        costs: Any = None,
        least: float | None = None,
        first: bool = False,
    ) -> None:
        super().__init__(f"{fact}; {remedy}" if remedy else fact)
        self.fact, self.remedy = fact, remedy
        self.costs, self.least, self.first = costs, least, first

    def where(self, place: str) -> InfeasibleBudget:
        """Return the same error, which names the place that the budget comes from."""
        return self._told(f"{place}: {self.fact.removeprefix('budget: ')}", self.remedy)

    def kept(self, table: str) -> InfeasibleBudget:
        """Return the same error, which says how the table that was measured is used again."""
        return self._told(
            self.fact, f"{self.remedy}; the costs are kept: --set cost.table={table} reads them"
        )

    def _told(self, fact: str, remedy: str) -> InfeasibleBudget:
        return InfeasibleBudget(fact, remedy, costs=self.costs, least=self.least, first=self.first)


class BudgetMissed(HalocError):
    """The planned network, timed as a whole, does not keep its budget; nothing is trained.

    Attributes:
        plan: the `RankPlan` that was timed, for those who use it all the same.
    """

    def __init__(self, message: str, plan: Any = None) -> None:
        super().__init__(message)
        self.plan = plan


class Diverged(HalocError, ArithmeticError):
    """A loss, a weight or a logit is no longer finite."""


class UnusableCheckpoint(HalocError):
    """A checkpoint can't be read, or was made with other settings."""


class MissingPackage(HalocError, ImportError):
    """A command or a setting needs a package that is not installed; the message says which."""


@contextmanager
def as_one_line(kind: type[HalocError] = SettingsError, where: str = "") -> Iterator[None]:
    """Turn an OSError or a ValueError of the block into an error of the family.

    Args:
        kind: class of the new error. An error that is of the family already passes unchanged.
        where: key, layer or file that the message begins with.
    """
    try:
        yield
    except HalocError:
        raise
    except (OSError, ValueError) as error:
        raise kind(f"{where}: {reason_of(error)}" if where else reason_of(error)) from None


@contextmanager
def needs(*packages: str, what: str, install: str) -> Iterator[None]:
    """Import optional packages, then run a block; one that is missing is one line.

    Args:
        packages: names to import. The block may import others, which are looked after, too.
        what: the command, setting or function that needs them.
        install: what ``pip install`` is to be given: ``onnxruntime``, ``nni-haloc[onnx]``.

    Raises:
        MissingPackage: if one of the packages is not installed.
    """
    try:
        for package in packages:
            import_module(package)
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "nni_haloc":  # a defect of ours
            raise
        remedy = f"pip install {install!r}" if "[" in install else f"pip install {install}"
        message = f"{what}: needs the package {error.name}, which is not installed ({remedy})"
        raise MissingPackage(message) from None


@contextmanager
def no_endless_nesting() -> Iterator[None]:
    """Turn the error of lists and dicts that contain themselves into one line, for a block.

    Raises:
        HalocError: in the place of RecursionError.
    """
    try:
        yield
    except RecursionError:
        expected = "expected tensors in lists and dicts, found one inside itself or far too deep"
        raise HalocError(f"the network's inputs and outputs: {expected}") from None


def printable(message: str, most: int = 1000) -> str:
    """Put a message on one line of at most ``most`` characters; escape what can't be printed."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in message
    )
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def out_of_memory(error: BaseException) -> str | None:
    """Return a line with the remedy if a library has run out of memory; None for other errors."""
    text = first_line(error)
    signs = ("can't allocate memory", "out of memory", "Unable to allocate")
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in signs):
        remedy = "set data.batch_size, cost.batch_size or data.size lower, or --batch and --input"
        return printable(f"not enough memory ({text}); {remedy}")
    return None


def brief(value: Any, most: int = 80) -> str:
    """Write a value for a message: as Python does, cut off after ``most`` characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of more digits than Python writes"
    return text if len(text) <= most else f"{text[: most - 4]} ... ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's class if it has none."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a message: torch adds advice to load the file unsafely."""
    return first_line(error).split(". ")[0]


def reason_of(error: Exception) -> str:
    """Return what went wrong; for the system's errors also the file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def expected_one_of(names: Iterable[str], found: str) -> str:
    """Say which names were expected instead of ``found``, and which of them is like it."""
    known = list(names)
    return f"expected one of {', '.join(known)}, found {brief(found)}{likely(found, known)}"


def matches_none(pattern: str, names: Iterable[str], most: int = 8) -> str:
    """Write a pattern that matches none of these names, which they are, and which is like it."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    some = f"; expected one of {', '.join(known[:most])}{more}" if known else ""
    return f"{brief(pattern)}{some}{likely(pattern, known)}"


def explain(error: ValidationError, section: type[BaseModel] | None = None) -> str:
    """Return pydantic's errors on one line: key, what was expected, what was found.

    Args:
        error: the errors, of which one is told; an unknown key before all others.
        section: the model that was validated; with it an unknown key is told its likely name.
    """
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first = errors[0]
    path = [part if len(part := str(key)) <= 80 else f"{part[:76]} ..." for key in first["loc"]]
    if first["type"] == "extra_forbidden":
        message = unknown_key(path[-1], _keys(section, path[:-1]))
    elif first["type"] == "missing":
        top = section is not None and len(path) == 1
        message = f"missing; haloc settings {path[0]} explains it" if top else "missing"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        found = first.get("input")
        plain = isinstance(found, (str, int, float, bool, type(None)))
        shown = brief(found) if plain else type(found).__name__
        reason = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        if first["type"] in ("model_type", "dict_type"):
            reason = "expected keys and values"
        message = f"{reason}, found {shown}"
        if path[-1:] == ["sparsity"] and isinstance(found, (int, float)) and 1 < found < 100:
            message += f"; write {found / 100:g} for {found:g} %"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return (f"{'.'.join(path)}: " if path else "") + message + more


def unknown_key(found: str, known: Iterable[str]) -> str:
    """Say that a key is unknown, and which of the known ones is like it."""
    return "unknown key" + likely(found, list(known))


def likely(found: str, known: list[str]) -> str:
    """Return ``; did you mean ...?`` with the known name that is most like one; or nothing."""
    by_lower = {name.lower(): name for name in known}
    text = found[:100].lower()
    close = get_close_matches(text, by_lower, 1)
    if not close and len(text) > 2:
        initials = "".join(word[:1] for word in text.replace("-", "_").split("_"))
        close = [x for x in by_lower if x.startswith(text) or x == initials][:1]
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def _keys(section: Any, path: Iterable[str]) -> list[str]:
    """Return the keys of a section of the settings, which stands under ``path``."""
    for key in path:
        field = getattr(section, "model_fields", {}).get(key)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return list(getattr(section, "model_fields", {}))
