"""TFDS data sets: prepared without TensorFlow, they give what the files give."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from pplug_jax.data import tfds_builder
from pplug_jax.data.lamp import read
from pplug_jax.data.tasks import TASKS
from pplug_jax.data.tfds_builder import read_tfds
from pplug_jax.errors import DataError
from tests.support.lamp_files import write_split

QUESTIONS = [
    {
        "id": "310",
        "input": "Generate a headline for the following article: Über {x} \u2028 naïve 😀\0",
        "user_id": "u😀",
        "profile": [
            {"id": "3100", "title": "Later 😀", "text": " blanks stay ", "date": "2014-03-07"},
            {"id": "3101", "title": "", "text": "nul\0", "date": "2013-12"},
        ],
    },
    {"id": "311", "input": "second", "profile": []},
    {"id": "312", "input": "undated", "profile": [{"title": "t", "text": "x"}] * 3},
]
OUTPUTS = ["Ä 😀", "", "C"]


def lamp_files(directory: Path, task: str, split: str, outputs: list[str] | None) -> Path:
    ids = [question["id"] for question in QUESTIONS]
    golds = outputs and [{"id": i, "output": o} for i, o in zip(ids, outputs, strict=True)]
    return write_split(directory, split, QUESTIONS, golds and {"task": task, "golds": golds})


def json_lines(directory: Path, split: str, records: list[Any]) -> Path:
    directory.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / f"{split}.jsonl").write_text(lines)
    return directory


def prepare(config: str, files: Path) -> str:
    """The directory of the data set made of `files`, beside them."""
    builder = tfds.builder(f"personal_texts/{config}", data_dir=files.parent / "tfds")
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir=files),
    )
    return builder.data_dir


def check_equal(directory: str, files: Path, split: str, task: str) -> None:
    for sort_by_date in (True, False):
        expected = list(read(files, split, TASKS[task], sort_by_date=sort_by_date))
        examples = read_tfds(directory, split, TASKS[task], sort_by_date=sort_by_date)
        assert list(examples) == expected
        assert examples[-1] == expected[-1]


@pytest.fixture(scope="module")
def headlines(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """LaMP-4's data set and its files."""
    files = tmp_path_factory.mktemp("headlines") / "LaMP_4"
    lamp_files(files, "LaMP_4", "dev", OUTPUTS)
    lamp_files(files, "LaMP_4", "test", None)
    return prepare("LaMP_4_time", files), files


def test_a_data_set_gives_what_its_files_give(headlines: tuple[str, Path]):
    check_equal(*headlines, "dev", "LaMP_4")
    check_equal(*headlines, "test", "LaMP_4")
    assert "tensorflow" not in sys.modules


def test_a_data_set_of_several_files_keeps_the_order(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tfds_builder, "SHARD", 2)
    files = lamp_files(tmp_path / "LaMP_4", "LaMP_4", "train", OUTPUTS)
    directory = prepare("LaMP_4", files)
    assert len(list(Path(directory).glob("*train*-of-00002"))) == 2
    check_equal(directory, files, "train", "LaMP_4")


def test_tfds_reads_it_without_this_package_and_without_tensorflow(headlines: tuple[str, Path]):
    code = """if True:
        import json, sys
        import tensorflow_datasets as tfds
        source = tfds.data_source("personal_texts/LaMP_4_time", split="dev", data_dir=sys.argv[1])
        unwanted = {"tensorflow", "pplug_jax"} & set(sys.modules)
        titles = [title.decode() for title in source[0]["profile"]["title"]]
        print(json.dumps([len(source), source[1]["id"].decode(), titles, list(unwanted)]))
    """
    data_dir = headlines[1].parent / "tfds"
    command = [sys.executable, "-c", code, str(data_dir)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said.splitlines()[-1]) == [3, "311", ["Later 😀", ""], []]


def test_scores_that_are_numbers(tmp_path: Path):
    items = [{"id": "1", "text": "good", "score": 5}, {"id": "2", "text": "bad", "score": "1"}]
    questions = [{"id": "210", "input": "review: x", "profile": items}]
    golds = {"task": "LaMP_3", "golds": [{"id": "210", "output": "4"}]}
    files = write_split(tmp_path / "LaMP_3", "dev", questions, golds)
    check_equal(prepare("LaMP_3", files), files, "dev", "LaMP_3")


def test_your_own_users(tmp_path: Path):
    items = [{"text": "a", "date": "2024"}, {"text": "b", "title": "T", "label": 3, "date": "2023"}]
    records = [
        {"user": "u", "input": "q", "output": "a", "profile": items},
        {"id": 7, "input": "", "output": "", "profile": []},
    ]
    files = json_lines(tmp_path / "custom", "train", records)
    json_lines(files, "asked", [{"input": "q", "profile": items}])
    directory = prepare("custom", files)
    check_equal(directory, files, "train", "custom")
    check_equal(directory, files, "asked", "custom")


def test_an_empty_date_counts_when_a_profile_is_sorted(tmp_path: Path):
    dates = ["2024", "", "2023"]
    items = [{"text": str(n), "date": date} for n, date in enumerate(dates)]
    files = json_lines(tmp_path / "custom", "train", [{"input": "q", "profile": items}])
    example = read_tfds(prepare("custom", files), "train", TASKS["custom"])[0]
    expected = read(files, "train", TASKS["custom"])[0]
    assert [i["text"] for i in example.profile] == [i["text"] for i in expected.profile]


def test_what_a_judge_needs(tmp_path: Path):
    task = TASKS["LaMP_QA"]
    record = {"id": "1", "question": "?", "narrative": "é", "rubric_aspects": [{"aspect": "a"}]}
    files = json_lines(tmp_path / "qa", "test", [record | {"profile": [{"text": "t"}]}])
    directory = prepare("LaMP_QA", files)
    check_equal(directory, files, "test", "LaMP_QA")
    assert read_tfds(directory, "test", task).record(0) == record


def test_every_task_has_a_data_set():
    names = set(tfds_builder.PersonalTexts.builder_configs)
    assert names == set(TASKS) | {f"LaMP_{n}_time" for n in range(1, 8)}
    for name in names:
        assert tfds.builder(f"personal_texts/{name}").info.features


def test_other_data_are_refused(headlines: tuple[str, Path], tmp_path: Path):
    directory, _ = headlines
    with pytest.raises(
        DataError, match="personal_texts/LaMP_4_time, the config's task is 'LaMP_3'"
    ):
        read_tfds(directory, "dev", TASKS["LaMP_3"])
    with pytest.raises(DataError, match="Unknown split 'train'"):
        read_tfds(directory, "train", TASKS["LaMP_4"])
    with pytest.raises(DataError, match="Could not read"):
        read_tfds(tmp_path, "dev", TASKS["LaMP_4"])


def test_bad_files_are_told_as_the_reader_tells_them(tmp_path: Path):
    files = lamp_files(tmp_path / "LaMP_4", "LaMP_4", "dev", OUTPUTS)
    questions = [*QUESTIONS, QUESTIONS[0]]
    (files / "dev_questions.json").write_text(json.dumps(questions))
    with pytest.raises(DataError) as said_by_reader:
        read(files, "dev", TASKS["LaMP_4"])
    with pytest.raises(DataError) as said:
        prepare("LaMP_4", files)
    assert str(said.value) == str(said_by_reader.value)


def test_files_without_questions_are_refused(tmp_path: Path):
    files = json_lines(tmp_path / "empty", "train", [])
    with pytest.raises(DataError, match="the split train has no questions"):
        prepare("custom", files)
    with pytest.raises(DataError, match="no {split}_questions.json and {split}_outputs.json"):
        prepare("LaMP_4", files)
