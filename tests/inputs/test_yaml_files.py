"""YAML as users write it: what is wrong is one line with key and line, in bounded time."""

import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from yaml.nodes import MappingNode, SequenceNode

from nni_haloc.inputs import yaml_files
from nni_haloc.inputs.yaml_files import parse_yaml, read_search_space, read_yaml
from nni_haloc.utils.errors import SettingsError

MEGABYTE = 1 << 20


def refusal(text, exponents=True):
    """Return why a text is refused, which must be one short line that begins with its name."""
    with pytest.raises(SettingsError) as caught:
        parse_yaml(text, "run.yml", exponents=exponents)
    message = str(caught.value)
    assert message.startswith("run.yml")
    assert message.isprintable()
    assert len(message) < 300
    return message.removeprefix("run.yml")


SEARCH_TWICE = """\
model: {name: digits_cnn}
search: {epochs: 2}
budget: 0.3
search: {lam: 2}
"""


@pytest.mark.parametrize("exponents", [True, False])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SEARCH_TWICE, ", line 4: search: given twice"),
        ("search:\n  lam: 1\n  lam: 1\n", ", line 3: search.lam: given twice"),
        ("a:\n  b:\n  - {c: a}\n  - {c: b,\n     c: c}", ", line 5: a.b.1.c: given twice"),
        ("a: 1\n'a': 2\n", ", line 2: a: given twice"),
        ("1: a\n0x1: b\n", ", line 2: 0x1: given twice"),
        ("yes: a\ntrue: b\n", ", line 2: true: given twice"),
        ("? a\n: 1\n? a\n: 2", ", line 3: a: given twice"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x", ", line 4: y.<<: given twice; write <<: ["),
        ("x: &x {a: 1, a: 2}\ny: {<<: *x}", ", line 1: x.a: given twice"),
    ],
)  # fmt: skip
def test_a_key_that_is_given_twice_is_refused_with_its_line(text, message, exponents):
    assert refusal(text, exponents).startswith(message)


NO_TEXT = {
    "a boolean (true or false)": ["on", "Off", "yes", "NO", "true", "False"],
    "null (nothing)": ["~", "null", "Null"],
    "a number": ["1", "0x1", "1_000", "-3", "1.5", ".inf", ".nan", "012", "1:30"],
}


@pytest.mark.parametrize("exponents", [True, False])
@pytest.mark.parametrize(
    ("key", "kind"), [(key, kind) for kind, keys in NO_TEXT.items() for key in keys]
)
def test_a_key_that_yaml_takes_for_something_else_is_told_to_be_quoted(key, kind, exponents):
    assert not isinstance(yaml.safe_load(key), str)
    why = f"expected text as a key, found {kind}; put the key in quotes: "
    assert refusal(f"a: 1\n{key}: 1", exponents) == f', line 2: {key}: {why}"{key}"'
    for text, place in (
        (f"a: 1\nb:\n  {key}: x", ", line 3: b"),
        (f"b: {{c: [1, {{{key}: 1}}]}}", ": b.c.1"),
        (f"x: &x\n  {key}: 1\ny: {{<<: *x}}", ", line 2: x"),
    ):
        assert refusal(text, exponents) == f'{place}.{key}: {why}"{key}"'
    quoted = f"a: {{\"{key}\": 1, ? '{key}b' : 2, !!str {key}c: 3}}"
    found = {"a": {key: 1, f"{key}b": 2, f"{key}c": 3}}
    assert parse_yaml(quoted, exponents=exponents) == found


def test_a_key_that_is_left_out_is_told_so():
    assert refusal("a: 1\n?\n: 2").endswith('found null (nothing); put the key in quotes: ""')


def test_a_key_that_is_a_date_to_nni_alone_is_one_to_nni_alone():
    text = "a: {2026-01-02: 1}"
    assert parse_yaml(text) == {"a": {"2026-01-02": 1}}
    why = (
        ': a.2026-01-02: expected text as a key, found a date; put the key in quotes: "2026-01-02"'
    )
    assert refusal(text, exponents=False) == why


HALVES = ["\\ud800", "\\uDBFF", "\\udc00", "\\uDfFf", "\\ud83d\\ude00"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("exponents", [True, False])
def test_half_of_a_character_is_told_with_key_and_line(half, exponents):
    found = f"found half of a character, '{half[:6].lower()}'"
    why = f"expected text, {found}; write the character itself"
    assert refusal(f'a: 1\nb: "x{half}"', exponents) == f", line 2: b: {why}"
    assert refusal(f'a: {{b: [1, "{half}"]}}', exponents) == f": a.b.1: {why}"
    assert refusal(f'a:\n  "{half}": 1', exponents) == f", line 2: a: {why}"


def test_whole_characters_are_no_halves():
    assert parse_yaml('a: "\\U0001F600\\uE000\\uD7FF"') == {"a": "\U0001f600\ue000\ud7ff"}


def test_the_same_key_in_different_sections_is_no_mistake():
    text = "a: {lr: 1}\nb: {lr: 2}\nc: [{lr: 3}, {lr: 4}]"
    assert parse_yaml(text, "run.yml") == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text",
    [
        "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}",
        "x: &x {a: 1}\nz: &z {a: 2, c: 3}\ny: {<<: [*x, *z], d: 4}",
        "x: &x {a: 1}\ny: &y {<<: *x, b: 2}\nz: {<<: *y, a: 3}",
        "y: {b: 3, <<: {a: 1, b: 2}}",
        "x: &x {}\ny: {<<: *x}\nz: {<<: []}",
        "x: &x {a: {b: 1}}\ny: {<<: *x, a: {c: 2}}",
    ],
)
def test_merges_mean_what_yaml_says(text):
    """An own key counts before a merged one, and an earlier one of a list before a later."""
    for exponents in (True, False):
        assert parse_yaml(text, "run.yml", exponents=exponents) == yaml.safe_load(text)


def test_equal_keys_that_are_merged_are_no_mistake_however_often():
    """Each step repeats what it merges: the list of pairs would double 60 times."""
    steps = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60)]
    content = parse_yaml("\n".join(["a0: &a0 {k: 1}", *steps]), "run.yml")
    assert all(row == {"k": 1} for row in content.values())


DEEP = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: *a{i - 1}, k{i}: 1}}\n" for i in range(1, 500)
)
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
NUMBER = "expected a number, found one of"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "<<: expected at most 10,000 values in all"),
        (LAUGHS, "expected at most 10,000 values, its aliases written out"),
        ("a: [" + "1," * 11_000 + "]", "expected at most 10,000 values, found more"),
        ("seed: " + "9" * 5000, f": seed: {NUMBER} 5,000 characters"),
        ("a: {b: [" + "1" * 200_000 + "]}", f": a.b.0: {NUMBER} 200,000 characters"),
        ("a: 0x" + "f" * 5000, f": a: {NUMBER} 5,002 characters"),
        ("a: 1" + ":59" * 100_000, f": a: {NUMBER} 300,001 characters"),
        ("a: -1." + "5" * 1000 + "e+5", f": a: {NUMBER}"),
        ("? " + "9" * 5000 + "\n: 1", f"{NUMBER} 5,000 characters"),
        ("a: &a {<<: *a}", "<<: merges itself"),
        ("a: &a {b: *a}", "its aliases written out"),
        ("a: {<<: 1}", "<<: expected keys and values to merge, found a scalar"),
        ("a: {<<: [{b: 1}, c]}", "<<: expected keys and values to merge, found a scalar"),
        ("[" * 5000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("- " * 5000, "nested too deeply"),
        ("k" * 2000 + ": 1", "mapping values are not allowed here"),
        ("a:\n\tb: 1", r", line 2: not valid YAML (found character '\t'"),
        ("a: 1\n---\nb: 2", ", line 2: not valid YAML (expected one document, found another"),
        ("a: 1\nb: x\0y", r", line 2: expected text, found the character '\x00'"),
        ("a: 1\nb: \x1b[31m", r", line 2: expected text, found the character '\x1b'"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ('a: "\\ud800"', r": a: expected text, found half of a character, '\ud800'"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", ", line 1: not valid YAML"),
        ("a: !!bool x", ": a: not a value of the kind 'bool'"),
        ("a: !!int ''", ": a: not a value of the kind 'int'"),
        ("a: !!float x", ": a: not a value of the kind 'float'"),
        ("a: !!map [b]", "expected keys and values, found a sequence"),
        ("[a]: 1", "expected a plain key"),
        ("a: *b", "found undefined alias"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value)[:24],
)
def test_a_trap_is_one_line(monkeypatch, text, message):
    monkeypatch.setattr(yaml_files, "_MOST", 10_000)
    for exponents in (True, False):
        assert message in refusal(text, exponents)


@pytest.mark.parametrize("tag", ["python/object:os.system", "python/object/apply:os.mkdir"])
def test_a_tag_of_python_is_refused(tag):
    assert "the tag !!python/object" in refusal(f"a: 1\nb: !!{tag} [mark]")
    assert "could not determine a constructor" in refusal(f"a: !!{tag} [mark]", exponents=False)


@pytest.mark.parametrize("tag", ["timestamp 2026-01-02", "binary YQ==", "set {a}", "omap [a: 1]"])
def test_our_own_files_hold_what_json_holds(tag):
    assert "is not known here; write plain values" in refusal(f"a: !!{tag}")


def test_nnis_dates_are_dates_and_a_wrong_one_is_one_line():
    text = "a: 2026-01-02"
    assert parse_yaml(text, "run.yml", exponents=False) == yaml.safe_load(text)
    assert parse_yaml(text, "run.yml") == {"a": "2026-01-02"}
    for wrong in ("2026-13-45", "!!timestamp x"):
        message = refusal(f"a: {wrong}", exponents=False)
        assert message.startswith(": a: not a value of the kind 'timestamp'")


@pytest.mark.parametrize("text", ["1e-3", "1E5", ".5e1", "+1.e2", "-2.5e+3", "1e400"])
def test_a_number_with_an_exponent_is_one(text):
    assert parse_yaml(f"a: {text}", "run.yml") == {"a": float(text)}


@pytest.mark.parametrize("text", ["1e3x", "12e4f90a", "1e", "e5", "1e5.0", "1e-3-run", "1_0e3"])
def test_text_that_begins_like_a_number_is_text(text):
    """Such as a file's name, or the digest of a commit."""
    assert parse_yaml(f"a: {text}", "run.yml") == {"a": text}


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**18), 10**18),
        st.floats(allow_nan=False, allow_infinity=False),
        # PyYAML writes 1e3 without quotes, and here that is a number.
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=6).filter(
            lambda text: not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text, re.ASCII)
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abcé <-", max_size=3), inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text("ab<:", min_size=1, max_size=3), plain), st.booleans())
@settings(deadline=None)
def test_what_is_written_is_read_back(content, flow):
    text = yaml.safe_dump(content, default_flow_style=flow, allow_unicode=True)
    assert parse_yaml(text, "run.yml") == yaml.safe_load(text) == content


fragments = st.lists(
    st.sampled_from(
        ["a", "b", "a: ", "b: ", "<<: ", "*x", "&x ", "{", "}", "[", "]", ", ", "\n", "\n  ",
         "\n- ", "1e3", "0x1f", "1:30", "2026-13-45", ".nan", "~", "!!int ", "!!timestamp ",
         "!!set ", "? ", "'", '"', "\\", "#", "---\n", "...\n", "%YAML 1.1\n", "|\n ", ">",
         "\t", "é", "\0", "\ud7ff", "=", "!", "9" * 400]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@given(fragments, st.booleans())
@settings(deadline=None, max_examples=400)
def test_any_text_is_read_or_refused_on_one_line(text, exponents):
    """What is read is what PyYAML reads; what it reads and we refuse is there twice, or no data."""
    try:
        content = parse_yaml(text, "run.yml", exponents=exponents)
    except SettingsError:  # printable by itself
        return
    json.dumps(content, default=str, skipkeys=True)
    if not exponents:
        assert repr(content) == repr(yaml.safe_load(text))
    assert not has_a_key_twice(yaml.compose(text, yaml.SafeLoader))


def has_a_key_twice(node, above=()):
    """Tell whether any mapping has two plain keys of one tag and text."""
    if id(node) in above:
        return False
    above = (*above, id(node))
    if isinstance(node, SequenceNode):
        return any(has_a_key_twice(item, above) for item in node.value)
    if not isinstance(node, MappingNode):
        return False
    found = [(key.tag, key.value) for key, _ in node.value if isinstance(key.value, str)]
    return len(found) > len(set(found)) or any(
        has_a_key_twice(item, above) for pair in node.value for item in pair
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"#" + b"x" * 10 * MEGABYTE, "expected at most 1,048,576 bytes, found more"),
        (b"a: 1\nb: \xe9", "line 2: expected text in UTF-8, found byte 0xe9"),
        ("a: 1".encode("utf-16"), "found UTF-16; save it as UTF-8"),
        (b"", "expected keys and values, found nothing"),
        (b"\xef\xbb\xbf- a", "expected keys and values, found list"),
        (bytes(100), r"found the character '\x00'"),
    ],
    ids=["comment", "Latin-1", "UTF-16", "empty", "mark", "NUL"],
)
def test_a_file_that_is_none_is_one_line(tmp_path, data, message):
    file = tmp_path / "run.yml"
    file.write_bytes(data)
    for exponents in (True, False):
        with pytest.raises(SettingsError) as caught:
            read_yaml(file, exponents=exponents)
        assert str(caught.value).startswith(str(file))
        assert message in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "run.yml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(tmp_path / "run.yml") == {"a": 1, "b": 2}


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "none.yml", "folder"])
def test_a_path_that_is_no_file_is_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError, match="rank_space: ") as caught:
        read_yaml(tmp_path / name, key="rank_space")
    assert str(caught.value).isprintable()


def test_a_long_text_takes_steps_in_proportion_to_its_length(monkeypatch):
    """Counted are the nodes, and the pairs that merges bring, not seconds."""
    counted = {}
    for size in (500, 1000):
        loaders = []
        init = yaml_files._Loader.__init__

        def noted(self, text, init=init, loaders=loaders):
            init(self, text)
            loaders.append(self)

        monkeypatch.setattr(yaml_files._Loader, "__init__", noted)
        steps = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a0]}}" for i in range(1, size)]
        parse_yaml("\n".join(["a0: &a0 {k: 1, l: 2}", *steps]), "run.yml")
        counted[size] = loaders[0]._nodes + loaders[0]._pairs
        monkeypatch.undo()
    assert counted[1000] / counted[500] == pytest.approx(2, rel=0.01)


def test_a_search_space_is_read_as_nni_reads_it(tmp_path):
    """As JSON, which may be indented by tabs and has 1e-3 for a number, or else as YAML."""
    file = tmp_path / "space.json"
    file.write_text('{\n\t"search.lam": {"_type": "choice", "_value": [1e-3, 2]}\n}')
    assert read_search_space(file)["search.lam"]["_value"] == [0.001, 2]
    file.write_text("search.lam: {_type: choice, _value: [1e-3, 2]}")
    assert read_search_space(file)["search.lam"]["_value"] == ["1e-3", 2]
    for text, message in (
        ('{"search.lam": 1,\n"search.lam": 2}', "line 2: search.lam: given twice"),
        ("search.lam: 1\nsearch.lam: 2", "line 2: search.lam: given twice"),
        ('{"search.lam": {"_value": [NaN]}}', "line 1: search.lam._value.0: expected a finite"),
        ("[1]", "expected keys and values, found list"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError) as caught:
            read_search_space(file)
        assert message in str(caught.value)
        assert str(file) in str(caught.value)
