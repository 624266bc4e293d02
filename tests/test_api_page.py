"""The page on Python: every public name is on it, with a docstring that says all that it must."""

import dataclasses
import inspect
import re

import pytest
from helpers.paths import ROOT

import nni_haloc
from nni_haloc.utils.errors import HalocError

PAGE = (ROOT / "docs" / "reference" / "api.md").read_text()
NAMES = [name for name in nni_haloc.__all__ if name != "__version__"]
KINDS = {name: getattr(nni_haloc, name) for name in NAMES}
FUNCTIONS = [name for name, kind in KINDS.items() if inspect.isfunction(kind)]
CLASSES = [name for name, kind in KINDS.items() if inspect.isclass(kind)]
OURS = [name for name in CLASSES if not issubclass(KINDS[name], HalocError)]


def methods():
    """Yield the public methods and functions that have a docstring of ours."""
    for name in OURS:
        for key, item in vars(KINDS[name]).items():
            item = getattr(item, "__func__", item)
            if inspect.isfunction(item) and not key.startswith("_") and item.__doc__:
                yield f"{name}.{key}", item
    yield from ((name, KINDS[name]) for name in FUNCTIONS)


CALLABLES = dict(methods())


def section(text, title):
    """Return a section of a docstring, or nothing."""
    found = re.search(rf"^{title}:\n((?:(?:    .*)?\n)+)", f"{text}\n", re.MULTILINE)
    return found[1] if found else ""


def arguments(text):
    """Return the names that a docstring explains."""
    lines = re.findall(r"^    \*{0,2}(\w+(?:, \*{0,2}\w+)*): ", text, re.MULTILINE)
    return {name.strip("* ") for line in lines for name in line.split(",")}


def test_names_are_functions_and_classes():
    assert sorted(FUNCTIONS + CLASSES) == sorted(NAMES)


def test_every_public_name_is_on_the_page_once_and_no_other():
    listed = re.findall(r"^::: nni_haloc\.(\w+)$", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(FUNCTIONS + OURS)


@pytest.mark.parametrize("name", CALLABLES)
def test_a_function_begins_with_an_imperative_sentence(name):
    first = inspect.getdoc(CALLABLES[name]).splitlines()[0]
    verb = first.split()[0]
    assert first.endswith(".")
    assert verb[0].isupper()
    assert not re.search("[^s]s$|ed$|ing$", verb), first
    assert verb not in ("The", "A", "An", "It", "What", "Which"), first


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_explains_what_it_takes_and_returns(name):
    function, text = KINDS[name], inspect.getdoc(KINDS[name])
    assert arguments(section(text, "Args")) >= set(inspect.signature(function).parameters)
    returned = inspect.signature(function).return_annotation
    assert section(text, "Returns") or returned in (None, "None"), returned


@pytest.mark.parametrize("name", OURS)
def test_a_class_explains_what_it_is_made_of(name):
    kind, text = KINDS[name], inspect.getdoc(KINDS[name])
    assert text.splitlines()[0].endswith(".")
    if dataclasses.is_dataclass(kind):
        taken = {field.name for field in dataclasses.fields(kind) if field.init}
    elif kind.__init__ is object.__init__ or inspect.isabstract(kind):
        return
    else:
        taken = set(inspect.signature(kind).parameters)
    said = arguments(section(text, "Args")) | arguments(section(text, "Attributes"))
    said |= set(re.findall(r'\n    (\w+):[^\n]*\n    """', inspect.getsource(kind)))
    assert said >= taken - {"args", "kwargs"}, taken - said


@pytest.mark.parametrize("name", [*CALLABLES, *OURS])
def test_an_example_stands_under_its_own_heading(name):
    """Outside of one, Markdown takes `>>>` for quotations."""
    text = inspect.getdoc(CALLABLES.get(name) or KINDS[name])
    assert text.count(">>>") == section(text, "Examples").count(">>>")
