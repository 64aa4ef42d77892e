"""LaMP-format files: what is read, and what is said of files that are not as they should be."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_jax.data import lamp
from pplug_jax.data.lamp import DataError, read
from pplug_jax.data.tasks import TASKS
from tests.support.lamp_files import write_split

TASK = TASKS["LaMP_5"]
QUESTIONS = [
    {
        "id": "410",
        "input": "Generate a title for the following abstract of a paper: Über {x} \u2028 naïve 😀",
        "profile": [
            {"id": "4100", "title": "Õne", "abstract": " blanks stay ", "date": "2014-03-07"},
            {"id": "4101", "title": "", "abstract": ""},
        ],
    },
    {"id": "411", "input": "second", "profile": []},
]
OUTPUTS = {
    "task": "LaMP_5",
    "golds": [{"id": "411", "output": "B"}, {"id": "410", "output": "Ä 😀"}],
}


def write(directory: Path, questions: Any = QUESTIONS, outputs: Any = OUTPUTS, split="dev") -> Path:
    return write_split(directory, split, questions, outputs)


def error(directory: Path, split: str = "dev") -> str:
    with pytest.raises(DataError) as caught:
        read(directory, split, TASK)
    return str(caught.value)


def edited(records: Any, *path_and_value: Any) -> Any:
    """A copy with the value at the path replaced; the value `...` removes it."""
    *path, last, value = path_and_value
    records = inner = copy.deepcopy(records)
    for key in path:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return records


@pytest.mark.parametrize("ascii", [True, False])
def test_good_files_are_read_verbatim_in_the_questions_order(tmp_path: Path, ascii: bool):
    questions = json.dumps(QUESTIONS, ensure_ascii=ascii).encode()
    examples = read(write(tmp_path, questions), "dev", TASK)
    assert [(e.id, e.input, e.target) for e in examples] == [
        ("410", QUESTIONS[0]["input"], "Ä 😀"),
        ("411", "second", "B"),
    ]
    assert examples[0].profile == tuple(QUESTIONS[0]["profile"])
    assert examples[1].profile == ()


def test_the_test_split_may_come_without_outputs(tmp_path: Path):
    write(tmp_path, outputs=None, split="test")
    assert [e.target for e in read(tmp_path, "test", TASK)] == [None, None]
    write(tmp_path, outputs=OUTPUTS, split="test")
    assert [e.target for e in read(tmp_path, "test", TASK)] == ["Ä 😀", "B"]


@pytest.mark.parametrize("name", ["questions", "outputs"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    write(tmp_path)
    (tmp_path / f"dev_{name}.json").unlink()
    assert f"{tmp_path / f'dev_{name}.json'}: no such file" in error(tmp_path)


def test_broken_json_is_placed_by_line_and_column(tmp_path: Path):
    said = error(write(tmp_path, b'[\n  {"id": "1",,}\n]'))
    assert "dev_questions.json: not JSON" in said
    assert "line 2, column 14" in said


def test_a_cut_file_and_a_web_page_are_not_json(tmp_path: Path):
    whole = json.dumps(QUESTIONS).encode()
    assert "cut off" in error(write(tmp_path, whole[:-20]))
    assert "line 1, column 1" in error(write(tmp_path, b""))
    # The benchmark's server answers a wrong path with a page and HTTP status 200.
    assert "line 1, column 1" in error(write(tmp_path, b"<!doctype html><html></html>"))


def test_other_encodings_are_refused(tmp_path: Path):
    latin = json.dumps(QUESTIONS, ensure_ascii=False).encode("utf-16")
    assert "the file is UTF-16; write it as UTF-8" in error(write(tmp_path, latin))
    latin = json.dumps(QUESTIONS, ensure_ascii=False).encode("latin-1", "replace")
    assert "not UTF-8 at byte" in error(write(tmp_path, latin))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["score", "date"])
def test_not_a_number_is_no_value(tmp_path: Path, field: str, value: float):
    item = {"id": "1", "text": "fine", "score": 4, "date": 2004.0, field: value}
    questions = [{"id": "30", "input": "review: good", "profile": [item]}]
    outputs = {"task": "LaMP_3", "golds": [{"id": "30", "output": "5"}]}
    write(tmp_path, questions, outputs)
    with pytest.raises(DataError, match=f"profile item 0: the field '{field}' is (nan|inf), no"):
        read(tmp_path, "dev", TASKS["LaMP_3"])


DATES = {
    "03/01/2024": True,
    "12/31/2023": True,
    "March 1, 2024": True,
    "31.12.2023": True,
    "2024-01-03": False,
    "2024/1/3 12:00": False,
    " 1999": False,
    "20240103": False,
    "2024-01-03T12:30:05.25+01:00": False,
    "2024-01-03 12:30:05 UTC": False,
    "2004.0": False,
    "1704285005": False,
    "1704285005123": False,
    "2024 March 1": True,
    "2024-Mar-01": True,
    "2024-01-03 1:00 PM": True,
    "12": True,
    "unknown": True,
    "": True,
}


@pytest.mark.parametrize("date", DATES)
def test_a_date_that_does_not_tell_the_order_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], date: str
):
    lamp._warned.cache_clear()
    questions = edited(QUESTIONS, 0, "profile", 0, "date", date)
    for i in range(1, len(questions[0]["profile"])):
        questions = edited(questions, 0, "profile", i, "date", "2001")
    write(tmp_path, questions)
    for _ in range(2):
        list(read(tmp_path, "dev", TASK))
    said = capsys.readouterr().out
    assert said.count("is no date as 2024-01-31 or Unix time") == DATES[date]
    if DATES[date]:
        assert f"warning: id '410', profile item 0: {date!r} is no" in said
    list(read(tmp_path, "dev", TASK, sort_by_date=False))
    assert capsys.readouterr().out == ""
    lamp._warned.cache_clear()
    for _ in range(2):
        lamp.check_history(TASK, questions[0]["profile"], sort_by_date=True)
    said = capsys.readouterr().out
    assert said.count(f"warning: history item 0: {date!r} is no date") == DATES[date]


def test_a_null_date_is_none(tmp_path: Path):
    write(tmp_path, edited(QUESTIONS, 0, "profile", 0, "date", None))
    profile = next(iter(read(tmp_path, "dev", TASK))).profile
    assert [item["id"] for item in profile] == [item["id"] for item in QUESTIONS[0]["profile"]]
    assert "date" not in profile[0]


def test_half_a_surrogate_pair_is_refused_where_it_stands(tmp_path: Path):
    # JSON can escape what no UTF-8 text can hold; it would end the run much later, in a tokenizer.
    said = error(write(tmp_path, edited(QUESTIONS, 0, "profile", 1, "title", "cut \ud83d")))
    assert "dev_questions.json: id '410', profile item 1: the field 'title'" in said


@pytest.mark.parametrize(
    ("questions", "outputs", "expected"),
    [
        ({"410": {}}, OUTPUTS, "dev_questions.json: expected a list of records, found dict"),
        (["410"], OUTPUTS, "dev_questions.json: question number 0: expected an object, found str"),
        (QUESTIONS, "golds", "dev_outputs.json: the file: expected an object, found str"),
        (QUESTIONS, {"task": "LaMP_5"}, "dev_outputs.json: the file: the field 'golds' is missing"),
        (QUESTIONS, {"golds": []}, "dev_outputs.json: the file: the field 'task' is missing"),
        (QUESTIONS, edited(OUTPUTS, "golds", {}), "'golds' must be list, not dict"),
        (QUESTIONS, edited(OUTPUTS, "golds", 1, "x"), "gold number 1: expected an object"),
    ],
)
def test_wrong_types_around_the_records(
    tmp_path: Path, questions: Any, outputs: Any, expected: str
):
    assert expected in error(write(tmp_path, questions, outputs))


@pytest.mark.parametrize("value", [..., None, 7, ["text"]])
@pytest.mark.parametrize(
    ("path", "where"),
    [
        ((0, "id"), "question number 0"),
        ((0, "input"), "id '410'"),
        ((1, "profile"), "id '411'"),
        ((0, "profile", 1, "title"), "id '410', profile item 1"),
        ((0, "profile", 0, "abstract"), "id '410', profile item 0"),
    ],
)
def test_a_bad_field_of_a_question_is_named(tmp_path: Path, path: tuple, where: str, value: Any):
    if path[-1] == "profile" and isinstance(value, list):
        where, field = "id '411', profile item 0: expected an object", ""
    else:
        field = f"the field {path[-1]!r} {'is missing' if value is ... else 'must be'}"
    said = error(write(tmp_path, edited(QUESTIONS, *path, value)))
    assert f"dev_questions.json: {where}" in said
    assert field in said


@pytest.mark.parametrize("value", [..., None, 7])
@pytest.mark.parametrize(("field", "where"), [("id", "gold number 1"), ("output", "id '410'")])
def test_a_bad_field_of_an_output_is_named(tmp_path: Path, field: str, where: str, value: Any):
    said = error(write(tmp_path, outputs=edited(OUTPUTS, "golds", 1, field, value)))
    assert f"dev_outputs.json: {where}: the field {field!r}" in said


def test_ids_stand_once(tmp_path: Path):
    said = error(write(tmp_path, [*QUESTIONS, QUESTIONS[1]]))
    assert "dev_questions.json: id '411': the id stands there more than once" in said
    twice = edited(OUTPUTS, "golds", [*OUTPUTS["golds"], OUTPUTS["golds"][0]])
    assert "dev_outputs.json: id '411': the id stands" in error(write(tmp_path, QUESTIONS, twice))


def test_questions_and_outputs_belong_together(tmp_path: Path):
    said = error(write(tmp_path, outputs=edited(OUTPUTS, "golds", 0, ...)))
    assert "dev_questions.json: id '411': it has no output in dev_outputs.json" in said
    said = error(write(tmp_path, questions=QUESTIONS[:1], outputs=OUTPUTS))
    assert "dev_outputs.json: id '411': it has no question" in said


def test_the_files_of_another_task_are_refused(tmp_path: Path):
    said = error(write(tmp_path, outputs=edited(OUTPUTS, "task", "LaMP_4")))
    assert "the task is 'LaMP_4', the config's is 'LaMP_5'" in said


def paths(tree: Any, prefix: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON tree."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [path for key in keys for path in ((*prefix, key), *paths(tree[key], (*prefix, key)))]


JSON_VALUES = st.sampled_from(
    [None, True, 3, 1.5, "", "410", "411", [], ["x"], [{}], {}, {"id": 1}]
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The two files with one thing wrong in one of them."""
    files: dict[str, Any] = {"questions": QUESTIONS, "outputs": OUTPUTS}
    name = draw(st.sampled_from(sorted(files)))
    kind = draw(st.sampled_from(["drop", "repeat", "retype", "cut", "byte"]))
    data = json.dumps(files[name], ensure_ascii=False).encode()
    place = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return files | {name: data[:place]}
    if kind == "byte":
        byte = draw(st.binary(min_size=0, max_size=2))
        return files | {name: data[:place] + byte + data[place + 1 :]}
    path = draw(st.sampled_from(paths(files[name])))
    if kind == "repeat":
        tree = inner = copy.deepcopy(files[name])
        for key in path[:-1]:
            inner = inner[key]
        if isinstance(inner, list):
            inner.append(inner[path[-1]])
        else:
            inner[f"{path[-1]} again"] = inner[path[-1]]
        return files | {name: tree}
    return files | {name: edited(files[name], *path, ... if kind == "drop" else draw(JSON_VALUES))}


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_a_damaged_file_reads_whole_or_raises_data_error(files: dict[str, Any]):
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), **files)
        try:
            examples = read(directory, "dev", TASK)
        except DataError as said:
            assert directory in str(said)
        else:
            assert len(examples) == len(QUESTIONS)


@settings(max_examples=300, deadline=None)
@given(mutated())
def test_leaving_out_what_is_bad_loses_nothing_in_silence(files: dict[str, Any]):
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), **files)
        bad: list[DataError] = []
        try:
            examples = read(directory, "dev", TASK, on_bad=bad.append)
        except DataError:  # a file that cannot be read to its end
            return
        questions = json.loads((Path(directory) / "dev_questions.json").read_text())
        wrong = [error for error in bad if error.file.endswith("questions.json")]
        assert len(examples) + len(wrong) == len(questions)
        assert len({example.id for example in examples}) == len(examples)
        if not bad:
            assert list(examples) == list(read(directory, "dev", TASK))


CUSTOM = TASKS["custom"]
RECORDS = [
    {"user": "a", "input": "x", "output": "y", "profile": [{"text": "t", "label": 2}]},
    {"user": 7, "input": "x", "output": "y", "profile": [{"text": "t", "title": None}], "id": 3},
    {"user": "b", "input": "😀", "output": "y", "profile": [], "id": "three"},
]


def write_lines(directory: Path, records: list[Any]) -> None:
    (directory / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_one_file_with_everything(tmp_path: Path):
    write_lines(tmp_path, RECORDS)
    first, second, third = read(tmp_path, "dev", CUSTOM)
    assert (first.id, first.user, first.input, first.target) == ("1", "a", "x", "y")
    assert first.profile == ({"text": "t", "label": "2", "title": ""},)
    assert (second.id, second.user) == ("3", "7")
    assert second.profile == ({"text": "t", "title": "", "label": ""},)
    assert (third.id, third.input, third.profile) == ("three", "😀", ())
    # The same as one list, where the lines are not to be had.
    (tmp_path / "dev.jsonl").unlink()
    (tmp_path / "dev.json").write_text(json.dumps(RECORDS))
    assert list(read(tmp_path, "dev", CUSTOM)) == [first, second, third]


def test_a_file_that_changes_under_its_reader_is_an_error(tmp_path: Path):
    write_lines(tmp_path, RECORDS)
    examples = read(tmp_path, "dev", CUSTOM)
    write_lines(tmp_path, [edited(RECORDS[0], "input", "longer than before")])
    with pytest.raises(DataError, match=r"dev\.jsonl: it was changed while it was in use"):
        list(examples)


def test_outputs_may_be_missing_from_all_or_from_none(tmp_path: Path):
    write_lines(tmp_path, [edited(record, "output", ...) for record in RECORDS])
    assert [e.target for e in read(tmp_path, "dev", CUSTOM)] == [None] * 3
    write_lines(tmp_path, [RECORDS[0], edited(RECORDS[1], "output", None), RECORDS[2]])
    with pytest.raises(DataError, match="line 2: the field 'output' is missing, which other"):
        read(tmp_path, "dev", CUSTOM)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_of_damaged_lines_each_is_read_or_told(data: st.DataObject):
    line = data.draw(st.integers(0, len(RECORDS) - 1))
    record = json.dumps(RECORDS[line], ensure_ascii=False).encode()
    kind = data.draw(st.sampled_from(["retype", "byte"]))
    if kind == "retype":
        path = data.draw(st.sampled_from(paths(RECORDS[line])))
        value = data.draw(st.just(...) | JSON_VALUES)
        record = json.dumps(edited(RECORDS[line], *path, value)).encode()
    else:
        place = data.draw(st.integers(0, len(record) - 1))
        garbage = data.draw(st.binary(max_size=2).filter(lambda b: b"\n" not in b))
        record = record[:place] + garbage + record[place + 1 :]
    lines = [json.dumps(each).encode() for each in RECORDS]
    lines[line] = record
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "dev.jsonl").write_bytes(b"\n".join(lines))
        bad: list[DataError] = []
        examples = read(directory, "dev", CUSTOM, on_bad=bad.append)
        assert len(examples) + len(bad) == len(RECORDS)
        assert len(list(examples)) == len(examples)
        if bad:
            with pytest.raises(DataError, match=r"dev\.jsonl: line \d"):
                read(directory, "dev", CUSTOM)
