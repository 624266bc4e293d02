"""JSON is read strictly: each key once, with the line of the second one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.files import read_json
from nni_haloc.utils.json_text import parse_json

plain = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(allow_nan=False), st.text()
).filter(lambda value: value not in (float("inf"), float("-inf")))
documents = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner)),
    max_leaves=20,
)
layouts = st.sampled_from([None, 0, 2, "\t"])


@given(documents, layouts, st.booleans())
@settings(deadline=None)
def test_a_valid_text_is_what_json_says(content, indent, escaped):
    text = json.dumps(content, indent=indent, ensure_ascii=escaped)
    assert parse_json(text) == json.loads(text)


keys = st.sampled_from(["a", "b", "a\n", "é", '"', "\\", "a:b", ",", "{", "}"])


class Pairs(list):
    """The pairs of an object, whose keys may be there twice."""


pairs = st.recursive(
    st.one_of(st.none(), st.text(max_size=3), st.integers(0, 9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(st.tuples(keys, inner), max_size=4).map(Pairs),
    ),
    max_leaves=12,
)


def written(value, escaped):
    """JSON with each value on a line of its own, and its keys as they are, twice or not."""
    if isinstance(value, Pairs):
        rows = [f"{json.dumps(k, ensure_ascii=escaped)} :\n{written(v, escaped)}" for k, v in value]
        return "{\n" + ",\n".join(rows) + "\n}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(written(v, escaped) for v in value) + "\n]"
    return json.dumps(value, ensure_ascii=escaped)


def twice(value, place=()):
    """The places of all keys that are there twice, in the order of the text."""
    seen = set()
    for number, item in enumerate(value if isinstance(value, list) else ()):
        key, inner = item if isinstance(value, Pairs) else (number, item)
        if key in seen:
            yield (*place, key)
        if isinstance(value, Pairs):
            seen.add(key)
        yield from twice(inner, (*place, key))


@given(pairs, st.booleans())
@settings(deadline=None, max_examples=300)
def test_a_key_that_is_given_twice_is_refused_with_its_place_and_its_line(value, escaped):
    text, found = written(value, escaped), next(twice(value), None)
    if found is None:
        parse_json(text)
        return
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    line, _, rest = str(caught.value).partition(": ")
    assert rest == f"{'.'.join(map(str, found))}: given twice"
    number = int(line.removeprefix("line "))
    assert text.split("\n")[number - 1].startswith(json.dumps(found[-1], ensure_ascii=escaped))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "a": 2}', "line 2: a: given twice"),
        ('{"costs": {\n"conv1": {"dense": 2, "dense": 3}}}', "line 2: costs.conv1.dense: given t"),
        ('[{"a": 1}, {"b": 1, "b": 2}]', "line 1: 1.b: given twice"),
        ('{"fixed":\nNaN}', "line 2: fixed: expected a finite number, found nan"),
        ('{"fixed": [1,\n-Infinity]}', "line 2: fixed.1: expected a finite number, found -inf"),
        ('{"fixed": 1e999}', "line 1: fixed: expected a finite number, found 1e999"),
        ('{"fixed": ' + "9" * 5000 + "}", "line 1: fixed: expected a number, found one of 5000"),
        (r'{"a": [1,' + "\n" + r'"x\ud800"]}', r"line 2: a.1: expected text, found half of a char"),
        (r'{"a": {"\uDFFF": 1}}', r"line 1: a: expected text, found half .*, '\\udfff'; write"),
        (r'"\ude00\ud83d"', r"line 1: expected text, found half of a character, '\\ude00'"),
        (r'{"a": "\ud83d\ude00", "b": "\ud83d"}', "line 1: b: expected text, found half"),
        ("NaN", "line 1: expected a finite number, found nan"),
        ("{", r"not a JSON file \(Expecting property name .*line 1 column 2"),
        ("", "not a JSON file"),
        ("[" * 100_000, "not a JSON file .nested too deeply"),
        ("\ufeff{}", "not a JSON file"),
        ("{'a': 1}", "not a JSON file"),
        ('{"a": 1} {"a": 2}', "not a JSON file"),
    ],
)
def test_what_is_refused_is_one_line_with_key_and_line(text, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [r'"\ud83d\ude00"', r'"\\ud800"', r'{"\\\\ud800": "\uD83D\uDE00"}']
)
def test_pairs_of_halves_and_escaped_backslashes_are_no_halves(text):
    assert parse_json(text) == json.loads(text)


def test_numbers_that_are_not_finite_are_read_where_a_reader_takes_them():
    assert parse_json('{"a": Infinity}', finite=False) == {"a": float("inf")}
    with pytest.raises(ValueError, match="a: given twice"):
        parse_json('{"a": NaN, "a": 1e999}', finite=False)


def test_a_file_is_refused_by_its_name_on_one_line(tmp_path):
    file = tmp_path / "model.json"
    for data, message in (
        (b'{"a\\n\\u001b": 1, "a\\n\\u001b": 2}', r"line 1: a\n\x1b: given twice"),
        (b"[]", "expected keys and values, found list"),
        ('{"a": "é"}'.encode("latin-1"), "line 1: expected text in UTF-8, found byte 0xe9"),
        (b'{"a": 1}'.ljust(2000), "expected at most 1,000 bytes, found more"),
        (b"\0", "not a JSON file"),
    ):
        file.write_bytes(data)
        with pytest.raises(SettingsError) as caught:
            read_json(file, most=1000)
        assert str(caught.value).startswith(f"{file}: ")
        assert message in str(caught.value)
        assert str(caught.value).isprintable()


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("version", [True, "1", 1.5, None, [1], 2])
def test_another_version_is_refused(tmp_path, version):
    (tmp_path / "a.json").write_text(json.dumps({"version": version}))
    with pytest.raises(SettingsError, match="expected a plan of version 1, found version"):
        read_json(tmp_path / "a.json", "plan", 1)
