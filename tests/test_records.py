"""Large JSON files, record by record: the same records and errors as when read at once."""

import codecs
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pplug_jax.data import records as records_module
from pplug_jax.data.records import array, document, load, records
from pplug_jax.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
LAYOUTS = st.fixed_dictionaries(
    {"indent": st.sampled_from([None, 0, 2]), "ensure_ascii": st.booleans()}
)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every token is cut somewhere."""
    monkeypatch.setattr(records_module, "CHUNK", 5)


def written(data: bytes) -> Path:
    with tempfile.NamedTemporaryFile(suffix=".json", delete=False) as file:
        file.write(data)
    return Path(file.name)


@settings(deadline=None, max_examples=200)
@given(st.lists(VALUES, max_size=6), LAYOUTS, st.sampled_from(["", "\ufeff", " \n\r\t"]))
def test_a_list_is_read_as_json_reads_it(values: list[Any], layout: dict, start: str):
    text = start + json.dumps(values, **layout) + "\n"
    path = written(text.encode("utf-8", "surrogatepass"))
    try:
        found = list(array(path))
        assert [value for _, value in found] == values
        assert [load(place) for place, _ in found] == values
        for place, _ in found:
            before = text.encode()[: place.start]
            assert place.line == before.count(b"\n") + 1
        assert [value for _, value in records(path)] == values
        assert document(path) == values
    finally:
        path.unlink()


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@example([{"a": "\\ud83d\\ude00"}], 9, b"")
@example(["x", 12345], 6, b"\xff")
@given(st.lists(VALUES, min_size=1, max_size=4), st.integers(0, 200), st.binary(max_size=2))
def test_a_damaged_list_fails_where_json_says(values: list[Any], place: int, garbage: bytes):
    data = json.dumps(values, ensure_ascii=False, indent=1).encode()
    place %= len(data)
    data = data[:place] + garbage + data[place + 1 :]
    path = written(data)
    try:
        expected = json.loads(data.decode())
    except json.JSONDecodeError as error:
        comma = "trailing " if "trailing" in error.msg else ""
        expected, where = None, f"{comma}at line {error.lineno}, column {error.colno};"
    except UnicodeDecodeError as error:
        expected, where = None, f"not UTF-8 at byte {error.start}"
    else:
        where = "expected a list"
    try:
        if isinstance(expected, list):
            assert [value for _, value in array(path)] == expected
        else:
            with pytest.raises(DataError, match="not UTF-8|not JSON|expected a list") as caught:
                list(array(path))
            # Of two faults, the one that is met first is told; the place of a comma that nothing
            # follows is told differently by Python's versions.
            said = str(caught.value)
            if "UTF-8" not in said + where and "a list" not in said and "trailing" not in where:
                assert where in said
    finally:
        path.unlink()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_records(tmp_path: Path, end: str):
    path = tmp_path / "train.jsonl"
    lines = ['{"a": "\u2028 ü"}', "", '{"a": 2}', "  "]
    path.write_bytes(end.join(lines).encode())
    found = list(records(path))
    assert [value for _, value in found] == [{"a": "\u2028 ü"}, {"a": 2}]
    assert [place.line for place, _ in found] == [1, 3]
    assert [load(place) for place, _ in found] == [value for _, value in found]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, name: str, end: str):
    path = tmp_path / name
    path.write_bytes(codecs.BOM_UTF8 + end.join(['{"a": "ü"}', '{"a": 2}']).encode())
    found = list(records(path, on_bad=[].append))
    assert [value for _, value in found] == [{"a": "ü"}, {"a": 2}]
    assert [load(place) for place, _ in found] == [value for _, value in found]
    # As several files with marks, or such a blank line, one behind the other.
    marked = [codecs.BOM_UTF8 * n + f'{{"a": {n}}}'.encode() for n in (2, 1, 0)]
    path.write_bytes(end.encode().join([codecs.BOM_UTF8, *marked]))
    found = list(records(path))
    assert [value for _, value in found] == [{"a": 2}, {"a": 1}, {"a": 0}]
    assert [load(place) for place, _ in found] == [value for _, value in found]
    path.write_bytes(codecs.BOM_UTF8 + b"not JSON\n")
    with pytest.raises(DataError, match="line 1: not JSON: Expecting value at column 1"):
        list(records(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_utf_16_file_says_so(tmp_path: Path, encoding: str):
    path = tmp_path / "train.jsonl"
    path.write_bytes(("\ufeff" * (encoding != "utf-16") + '{"a": 1}').encode(encoding))
    with pytest.raises(DataError, match=r"train\.jsonl: the file is UTF-16; write it as UTF-8"):
        list(records(path))


def test_a_broken_line_is_told_and_the_others_are_read(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    deep = b"[" * 100_000
    number = b'{"a": ' + b"9" * 5000 + b"}"
    path.write_bytes(b'{"a": 1}\n{"a": \n\xff\n' + deep + b"\n" + number + b'\n{"a": 2}')
    with pytest.raises(DataError, match=r"train\.jsonl: line 2: not JSON: .* at column 6"):
        list(records(path))
    bad: list[DataError] = []
    assert [value for _, value in records(path, bad.append)] == [{"a": 1}, {"a": 2}]
    assert [error.line for error in bad] == [2, 3, 4, 5]
    assert "not UTF-8" in str(bad[1])
    assert "nested too deeply" in str(bad[2])


@pytest.mark.parametrize("read", [list, document])
def test_what_no_reader_can_hold_is_an_error(tmp_path: Path, read: Any):
    path = tmp_path / "deep.json"
    for data in (b"[" * 100_000, b"[" + b"9" * 5000 + b"]"):
        path.write_bytes(data)
        with pytest.raises(DataError, match="deep.json: not JSON"):
            read(array(path) if read is list else path)


def test_lamp_6s_wrapped_test_questions_are_a_list(tmp_path: Path):
    path = tmp_path / "test_questions.json"
    path.write_text(json.dumps({"task": "LaMP_6", "golds": [{"id": "1"}, {"id": "2"}]}))
    assert [value for _, value in array(path)] == [{"id": "1"}, {"id": "2"}]


def test_reading_holds_a_window_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "CHUNK", 1 << 16)
    path = tmp_path / "large.json"
    with path.open("w") as file:
        for i in range(400):
            file.write(("[" if i == 0 else ",") + json.dumps({"text": f"{i} " + "word " * 5000}))
        file.write("]")
    size = path.stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in array(path)) == 400
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 9e6
    assert peak < size / 10
