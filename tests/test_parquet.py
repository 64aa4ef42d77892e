"""Parquet files of people's own data: what JSON lines give, and what is said of bad rows."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pplug_jax.data import parquet
from pplug_jax.data.lamp import read
from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import DataError

CUSTOM = TASKS["custom"]


def record(i: int) -> dict[str, Any]:
    items = [{"text": f"{i} {k} 😀", "title": "", "date": f"202{9 - k}"} for k in range(i % 4)]
    return {"user": f"u{i % 7}", "input": f"in {i}", "output": "\0 out", "profile": items}


RECORDS = [record(i) for i in range(150)]


def write(path: Path, records: list[dict[str, Any]], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path, **options)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """The records as JSON lines."""
    (tmp_path / "lines").mkdir()
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "lines" / "train.jsonl").write_text(text)
    return tmp_path / "lines"


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet"],
        ["train-0-of-2.parquet", "train-1-of-2.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["train/a.parquet"],
    ],
)
@pytest.mark.parametrize("group", [13, 1000])
def test_rows_are_what_lines_are(lines: Path, tmp_path: Path, names: list[str], group: int):
    size = len(RECORDS) // len(names)
    for n, name in enumerate(names):
        part = RECORDS[n * size : (n + 1) * size]
        write(tmp_path / "tables" / name, part, row_group_size=group)
    expected, examples = read(lines, "train", CUSTOM), read(tmp_path / "tables", "train", CUSTOM)
    assert list(examples) == list(expected)
    for index in (149, 0, 74, 75, 76, 12, 13):
        assert examples[index] == expected[index]
        assert examples.record(index)["input"] == f"in {index}"


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["train-00001-of-00002.parquet"], "1 of 2 parts are there: get the others"),
        (["data/dev-0-of-3.parquet", "data/dev-2-of-3.parquet"], "2 of 3 parts are there"),
        (["train-0-of-1.parquet", "train.parquet"], "train is also in .*: remove one of them"),
        (["train/a.parquet", "data/train-0-of-1.parquet"], "train is also in .*: remove one"),
        (["train-0-of-1.parquet", "train-0-of-2.parquet"], "train is also in .*: remove one"),
    ],
)
def test_a_split_that_is_not_whole_or_there_twice(tmp_path: Path, names: list[str], problem: str):
    for name in names:
        write(tmp_path / name, RECORDS[:3])
    with pytest.raises(DataError, match=problem):
        read(tmp_path, "train", CUSTOM)


def test_examples_can_be_sent_to_another_process(lines: Path, tmp_path: Path):
    write(tmp_path / "train.parquet", RECORDS)
    expected = list(read(lines, "train", CUSTOM))
    for directory in (lines, tmp_path):
        examples = read(directory, "train", CUSTOM)
        assert examples[100] == expected[100]
        assert list(pickle.loads(pickle.dumps(examples))) == expected


def test_one_batch_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "BATCH", 10)
    write(tmp_path / "train.parquet", RECORDS)
    sizes = [len(batch) for _, batch in parquet._batches(tmp_path / "train.parquet")]
    assert sizes == [10] * 15


def test_a_bad_row_is_told_with_file_row_and_field(tmp_path: Path):
    bad = [record(3) for _ in range(7)]
    bad[1]["profile"][2]["text"] = None
    bad[2]["input"] = None
    bad[3]["profile"] = None
    bad[4]["output"] = None
    write(tmp_path / "train.parquet", bad)
    told: list[DataError] = []
    assert len(read(tmp_path, "train", CUSTOM, on_bad=told.append)) == 3
    assert [str(error).removeprefix(f"{tmp_path}/") for error in told] == [
        "train.parquet: row 2, profile item 2: the field 'text' must be str, not NoneType",
        "train.parquet: row 3: the field 'input' must be str, not NoneType",
        "train.parquet: row 4: the field 'profile' must be list, not NoneType",
        "train.parquet: row 5: the field 'output' is missing, which other records have",
    ]
    with pytest.raises(DataError, match=r"train\.parquet: row 2, profile item 2: the field 'text'"):
        read(tmp_path, "train", CUSTOM)


def test_a_row_that_is_not_utf_8_is_told(tmp_path: Path):
    texts = pa.array([b"good", b"\xff", b"good"], pa.binary()).cast(pa.string(), safe=False)
    empty = pa.array([[]] * 3, pa.list_(pa.struct({"text": pa.string()})))
    pq.write_table(pa.table({"input": texts, "profile": empty}), tmp_path / "train.parquet")
    told: list[DataError] = []
    assert len(read(tmp_path, "train", CUSTOM, on_bad=told.append)) == 2
    assert [(error.where, error.line) for error in told] == [("row 2", None)]


@pytest.mark.parametrize("kept", [0, 2000])
def test_a_file_that_was_cut_off_is_told(tmp_path: Path, kept: int):
    write(tmp_path / "train.parquet", RECORDS)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:kept])
    with pytest.raises(DataError, match=r"train\.parquet: no whole Parquet file: "):
        read(tmp_path, "train", CUSTOM)


def test_no_file_of_any_form(tmp_path: Path):
    message = r"train\.jsonl: no such file, nor another of .* or train\.parquet"
    with pytest.raises(DataError, match=message):
        read(tmp_path, "train", CUSTOM)


def test_a_file_that_became_shorter_is_told(tmp_path: Path):
    write(tmp_path / "train.parquet", RECORDS)
    examples = read(tmp_path, "train", CUSTOM)
    write(tmp_path / "train.parquet", RECORDS[:9])
    with pytest.raises(DataError, match="it was changed while it was in use"):
        list(examples)
