"""README and documentation hold: links, commands, settings, messages and files of settings."""

import ast
import inspect
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from helpers.paths import PACKAGE, ROOT
from helpers.schema import FIELDS
from helpers.site import (
    PAGES,
    addresses,
    anchors,
    code,
    commands_page,
    errors_page,
    fences,
    links,
    reference,
)

import nni_haloc
from nni_haloc.experiments.keys import check_keys, spell_as_nni
from nni_haloc.inputs.config import Config, parse_config, set_dotted
from nni_haloc.inputs.reference import list_settings
from nni_haloc.inputs.yaml_files import parse_yaml
from nni_haloc.utils.errors import SettingsError

KEYS = {".".join(place) for place in FIELDS}
SECTIONS = {place[0] for place in FIELDS if len(place) > 1}
COMMANDS = commands_page.list_commands()
TODAY = [name for name in PAGES if name != "CHANGELOG.md"]
"""Pages that speak of this version alone."""


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for link in links(name):
        if re.match(r"\w+:", link):
            continue  # of the web, which tests don't ask
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else (ROOT / name)
        assert target.exists(), link
        page = target.relative_to(ROOT).as_posix()
        if anchor:
            assert anchor in anchors(page), link


def test_a_link_that_leads_nowhere_would_be_seen():
    assert "keys" in anchors("docs/reference/settings.md")
    assert {"search", "search.lam", "preset-paper"} <= anchors("docs/reference/settings.md")
    assert "haloc-run" in anchors("docs/reference/commands.md")
    assert "no-such" not in anchors("docs/reference/settings.md")
    assert any("#" in link for link in links("README.md"))


def lines_of_commands(name):
    """Yield every ``haloc COMMAND ...`` of a page, in sentences and in blocks."""
    texts = [line for _, text in fences(name) for line in text.replace("\\\n", " ").splitlines()]
    for text in [*texts, *code(name)]:
        for part in re.split(r"&&|\||;|#", text):
            if found := re.match(r"\s*(?:\w+=\S+ )*haloc ([a-z]+)\b(.*)", part):
                yield found[1], found[2]


@pytest.mark.parametrize("name", TODAY)
def test_every_command_and_option_in_the_documentation_exists(name):
    hidden = {"baseline"}
    for command, rest in lines_of_commands(name):
        assert command in COMMANDS.keys() | hidden, command
        if command in COMMANDS:
            known = commands_page.option_names(COMMANDS[command])
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", rest):
                assert option in known, f"haloc {command}{rest}"


def test_options_of_commands_are_found():
    found = list(lines_of_commands("README.md"))
    assert ("run", " run.yml --out FOLDER") in found
    assert len(found) > 10


def as_settings(content):
    """Read settings of which a page shows a part, on top of the fewest that a run needs."""
    whole = {"weights": "w.pth", "budget": 0.5, **content}
    for section, name in {"model": "digits_cnn", "data": "digits"}.items():
        whole[section] = {"name": name, **whole.get(section, {})}
    if whole.get("rule") == "plan":
        whole = {"plan": "plan.json", **whole}
    return parse_config(whole, "page", Path(), files=False)


BLOCKS = [
    pytest.param(text, id=f"{name}-{number}")
    for name in TODAY
    for number, (language, text) in enumerate(fences(name))
    if language in ("yaml", "yml")
]


@pytest.mark.parametrize("text", BLOCKS)
def test_a_file_of_settings_in_the_documentation_is_one(text):
    content = parse_yaml(text)
    if "trialCommand" in content:
        lacking = "openpai" in text  # NNI 3 has lost it, as the page says
        file = Path("haloc.yml")
        with pytest.raises(SettingsError, match="no such service") if lacking else nullcontext():
            check_keys(file, spell_as_nni(file, content))
    else:
        assert content.keys() <= Config.model_fields.keys(), content.keys()
        as_settings(content)


@pytest.mark.parametrize("name", TODAY)
def test_a_setting_that_a_sentence_names_exists(name):
    for text in code(name):
        found = re.fullmatch(r"([a-z_]+)\.([a-z_]+)", text)
        if (
            not found
            or found[1] not in SECTIONS
            or found[2] in ("onnx", "json", "py", "xml", "bin", "pte")
        ):
            continue
        is_module = (PACKAGE / found[1] / f"{found[2]}.py").exists()
        assert text in KEYS or is_module, text


def key_of(name):
    """Return the key of a name that a sentence may use: the whole one, or the last part of one."""
    same = [key for key in KEYS if key.rpartition(".")[2] == name]
    return name if name in KEYS else same[0] if len(same) == 1 else None


def settings_in_sentences(name):
    """Yield ``key: value`` of a page where the key can be no other's."""
    for text in code(name):
        found = re.fullmatch(r"((?:[a-z_]+\.)?[a-z_]+): (\S.*)", text)
        if found and key_of(found[1]) and "…" not in text and "..." not in text:
            yield key_of(found[1]), found[2]


INVENTED = {"abacus", "phone", "peak_kib"}
"""Names that the reader's own package would add."""


@pytest.mark.parametrize("name", TODAY)
def test_a_value_that_a_sentence_gives_a_setting_is_one_that_it_takes(name):
    for key, value in settings_in_sentences(name):
        if INVENTED & set(re.findall(r"\w+", value)):
            continue
        content = {}
        set_dotted(content, key, yaml.safe_load(value))
        as_settings(content)


def test_values_in_sentences_are_found():
    found = {pair for name in TODAY for pair in settings_in_sentences(name)}
    assert ("preset", "paper") in found
    assert len(found) > 10
    with pytest.raises(SettingsError):
        as_settings({"rule": "no such"})


def said_to_be_defaults():
    """Yield what a page calls the default: ``key: value``, ``--option VALUE``, ``name=value``."""
    for name in TODAY:
        text = " ".join(PAGES[name].split())
        yield from re.findall(r"(?<!`)`([^`]+)`(?:,| \() ?(?:the )?default\b", text)


def default_of(text):
    """Return the value that a text gives, and the true default of what it gives it to."""
    if found := re.fullmatch(r"([\w.]+): (.+)", text):
        field = FIELDS[tuple(key_of(found[1]).split("."))]
        return yaml.safe_load(found[2]), field.default
    if found := re.fullmatch(r"(--[\w-]+) (\S+)", text):
        parameters = [p for command in COMMANDS.values() for p in command.params]
        return found[2], next(str(p.default) for p in parameters if found[1] in p.opts)
    if found := re.fullmatch(r"(\w+)=(.+)", text):
        parameters = inspect.signature(nni_haloc.compress_model).parameters
        return ast.literal_eval(found[2]), parameters[found[1]].default
    return True, FIELDS[tuple(text.split("."))].default


def test_what_a_sentence_calls_the_default_is_it():
    found = set(said_to_be_defaults())
    assert {"supernet: nested", "quantize.int8", "--where alone"} <= found
    for text in found:
        value, default = default_of(text)
        assert value == default, text


@pytest.mark.parametrize(("page", "source"), addresses.COPIES.items())
def test_a_page_that_shows_another_file_says_so_in_its_own(page, source):
    text = (ROOT / "docs" / page).read_text()
    assert f"[{source}](../{source})" in text
    assert "`mkdocs serve -f .mkdocs.yml`" in text
    assert reference.written_out(page, text) == (ROOT / source).read_text()


PLACES = [(page, name) for page, parts in reference.PARTS.items() for name in parts]


@pytest.mark.parametrize(("page", "name"), PLACES)
def test_a_generated_part_says_in_the_file_what_it_is_and_what_prints_it(page, name):
    text = (ROOT / "docs" / page).read_text()
    (line,) = re.findall(rf"^(.+) <!-- {name} -->$", text, re.MULTILINE)
    commands = re.findall(r"`((?:haloc|python) [^`]+)`", line)
    sources = re.findall(r"`(nni_haloc/[^`]+)`", line)
    assert len(commands) == 1
    assert all((ROOT / path).exists() for path in sources)
    assert line not in PAGES[f"docs/{page}"]


def test_a_page_is_printed_with_its_generated_parts():
    command = "python docs/hooks/reference.py reference/errors.md"
    assert command in (ROOT / "docs/reference/errors.md").read_text()
    done = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == PAGES["docs/reference/errors.md"].strip()


def test_every_key_is_on_the_page_of_settings():
    page = PAGES["docs/reference/settings.md"]
    for setting in list_settings():
        assert f"`{setting.key}`" in page, setting.key
    assert "<!-- " not in page


@pytest.fixture(scope="module")
def literals():
    """Return every text of the source, with gaps for the values in it."""
    texts = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                texts.add(errors_page.text_of(node, {}))
    return re.sub(r"%[.\w]*[sdgf]", errors_page.GAP, "\n".join(texts))


QUOTED = re.findall(r"^> `(.+)`$", (ROOT / "docs/reference/errors.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED)
def test_a_message_that_is_explained_stands_in_the_source(message, literals):
    parts = [part.strip(" :;,()") for part in re.split(f"{errors_page.GAP}|; ", message)]
    said = [part for part in parts if len(part) > 3]
    assert said
    for part in said:
        assert part in literals, part


def test_twenty_messages_are_explained():
    assert len(QUOTED) >= 20


def test_the_messages_of_the_source_are_on_the_page():
    page = PAGES["docs/reference/errors.md"]
    found = set(errors_page.raised())
    assert len(found) > 100
    assert ("SettingsError", "inputs.yaml_files", "…: nested too deeply") in found
    assert all(message.replace("|", r"\|") in page for _, _, message in found)
