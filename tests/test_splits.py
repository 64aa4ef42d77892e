"""A config's splits: where they are read, what is said of bad ones, and every task end to end."""

import functools
import http.server
import importlib
import json
import re
import threading
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds

import pplug_jax.data.tfds_builder  # noqa: F401  registers the builder
from pplug_jax import Personalizer
from pplug_jax.config import checked
from pplug_jax.data import submission
from pplug_jax.data.check import check_data
from pplug_jax.data.lamp import read, splits
from pplug_jax.data.sources import data_directory, read_split
from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import CheckpointError, ConfigError, DataError, InputError
from pplug_jax.run import run
from pplug_jax.settings import Settings
from tests.support.lamp_files import write_split
from tests.support.task_files import INPUTS, write_task

MODE = "train_and_evaluate"
CONFIGS = {
    "LaMP_1": "lamp1",
    "LaMP_2": "lamp2",
    "LaMP_3": "lamp3",
    "LaMP_4": "lamp4",
    "LaMP_5": "lamp5",
    "LaMP_6": "lamp6",
    "LaMP_7": "lamp7",
    "generation_abstract": "longlamp_abstract",
    "product_review_writing": "longlamp_review",
    "topic_writing": "longlamp_topic",
    "email_generation": "longlamp_email",
    "LaMP_QA": "lamp_qa",
    "custom": "custom",
}


def config_of(task: str, path: Path, **settings: object) -> ml_collections.ConfigDict:
    config = importlib.import_module(f"configs.{CONFIGS[task]}").get_config()
    small = {
        "data.path": str(path),
        # The inputs are longer, so that all tasks have the same shapes and share what is compiled.
        "data.max_input_length": 96,
        "encoder.max_length": 16,
        "data.buckets": 1,
        "plug.num_persona_tokens": 1,
        "plug.projector_size": 16,
        "train.batch_size": 8,
        "train.epochs": 1.0,
        "eval.batch_size": 8,
        "eval.num_beams": 1,
        "eval.max_new_tokens": 4,
        "eval.bootstrap_samples": 50,
        "eval.top_k": 2,
    }
    small |= {name.replace("__", "."): value for name, value in settings.items()}
    config.update_from_flattened_dict(small)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_end_to_end(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    if "meteor" in TASKS[task].metrics:
        request.getfixturevalue("nltk_data")
    config = config_of(task, tmp_path / "data")
    judged = bool(TASKS[task].judged)
    for split, count in ((config.data.train_split, 8), (config.data.eval_split, 5)):
        write_task(tmp_path / "data", task, split, count, outputs=not judged)
    if not judged:
        config.methods = ("none", "bm25", "pplug")
    run(config, tmp_path / "run", MODE)
    split = config.data.eval_split
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    ids = [example.id for example in read_split(Settings.of(config), "eval")]
    for method in config.methods:
        path = tmp_path / "run" / "predictions" / f"{split}.{method}.json"
        submitted = json.loads(path.read_text())
        if judged:
            assert list(submitted) == ids
            assert all(list(outputs[0]) == ["output"] for outputs in submitted.values())
            lines = path.with_suffix(".judge.jsonl").read_text().splitlines()
            for line, id in zip(map(json.loads, lines), ids, strict=True):
                assert line["question"].startswith(INPUTS[task])
                assert line["response"] == submitted[id][0]["output"]
                assert line["rubric_aspects"] == line["narrative"] == [{"aspect": "a"}]
        else:
            assert submitted["task"] == task
            assert [gold["id"] for gold in submitted["golds"]] == ids
            for metric in set(TASKS[task].metrics) - {"exact_prefix"}:  # no gold has a prefix
                entry = results["methods"][method][metric]
                assert entry["low"] <= entry["value"] <= entry["high"]
    output = capsys.readouterr().out
    assert ("Only a judge can score" in output) == judged


@pytest.mark.parametrize(("split", "count"), [("dev[:3]", 3), ("dev[:99]", 5), ("dev", 5)])
def test_a_part_of_a_split(tmp_path: Path, split: str, count: int):
    write_task(tmp_path, "LaMP_4", "dev", 5)
    config = config_of("LaMP_4", tmp_path, data__eval_split=split)
    whole = read(tmp_path, "dev", TASKS["LaMP_4"])
    assert list(read_split(config, "eval")) == [whole[i] for i in range(count)]
    for part in ("dev[2:4]", "dev[-1:]", "dev[:10%]"):
        config.data.eval_split = part
        with pytest.raises(ConfigError, match=r"the first records alone can be named"):
            read_split(config, "eval")
    config.data.eval_split = "dev[:0]"
    with pytest.raises(DataError, match=r"the split dev\[:0\] has no questions"):
        read_split(config, "eval")


def test_a_judge_gets_the_records_of_a_part_of_a_split(tmp_path: Path):
    task = TASKS["LaMP_QA"]
    config = config_of("LaMP_QA", tmp_path)
    write_task(tmp_path, "LaMP_QA", config.data.eval_split, 3, outputs=False)
    config.data.eval_split += "[:2]"
    part = read_split(Settings.of(config), "eval")
    submission.write_judged(tmp_path / "judge.jsonl", task, part, dict.fromkeys("ab", "Answer."))
    lines = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == [example.input for example in part]
    assert all(line["narrative"] == [{"aspect": "a"}] for line in lines)


@pytest.mark.slow
def test_methods_beyond_the_default_ones_run(tmp_path: Path):
    for split in ("train", "dev"):
        write_task(tmp_path / "data", "LaMP_3", split, 8)
    methods = ("random", "dense", "pplug_no_instruction", "pplug_top4")
    run(config_of("LaMP_3", tmp_path / "data", methods=methods), tmp_path / "run", MODE)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]
    assert list(results) == list(methods)
    trained = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert trained == sorted(methods[2:])


@pytest.mark.slow
def test_a_served_history_is_read_as_in_the_evaluation(tmp_path: Path):
    for split, count in (("train", 16), ("dev", 8)):
        write_task(tmp_path / "data", "LaMP_2", split, count)
    config = config_of("LaMP_2", tmp_path / "data", methods=("pplug",))
    run(config, tmp_path / "run", MODE)
    personalizer = Personalizer.from_checkpoint(tmp_path / "run")
    submitted = json.loads((tmp_path / "run" / "predictions" / "dev.pplug.json").read_text())
    example, gold = read_split(Settings.of(config), "eval")[3], submitted["golds"][3]
    assert len(example.profile) == 3
    # Items are read with their tags, and in the order of their dates.
    for profile in (example.profile, example.profile[::-1]):
        assert personalizer.generate(example.input, profile) == gold["output"]
    texts = [f"D 3 {k} tag: comedy" for k in range(3)]
    np.testing.assert_array_equal(
        personalizer.soft_prompt(example.input, texts),
        personalizer.soft_prompt(example.input, example.profile[::-1]),
    )

    write_task(tmp_path / "data", "LaMP_2", "train", 8)
    with pytest.raises(CheckpointError, match="step 2, but this run has 1; the data have changed"):
        run(config, tmp_path / "run", "train")


@pytest.mark.slow
def test_the_test_split_is_answered_in_the_same_workdir(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of("LaMP_3", tmp_path / "data", methods=("none", "pplug"))
    for split, outputs in (("train", True), ("dev", True), ("test", False)):
        write_task(tmp_path / "data", "LaMP_3", split, 8, outputs=outputs)
    run(config, tmp_path / "run", MODE)
    before = (tmp_path / "run" / "results.json").read_text()
    config.data.eval_split = "test"
    run(config, tmp_path / "run", "evaluate")
    assert "The split's outputs are withheld" in capsys.readouterr().out
    assert (tmp_path / "run" / "results.json").read_text() == before
    submitted = json.loads((tmp_path / "run" / "predictions" / "test.pplug.json").read_text())
    assert [gold["id"] for gold in submitted["golds"]] == [f"test{i}" for i in range(8)]
    config.data.train_split = "test"
    with pytest.raises(ConfigError, match="test has no outputs to train on"):
        run(config, tmp_path / "other", "train")


def test_a_profile_with_dates_is_in_their_order_unless_told_otherwise(tmp_path: Path):
    items = [{"text": name, "title": "", "date": date} for name, date in ["b2", "c3", "a1"]]
    question = {"id": "1", "input": "article: x", "profile": items}
    write_split(tmp_path, "test", [question], None)
    for parity, order in ((False, "abc"), (True, "bca")):
        config = config_of("LaMP_4", tmp_path, parity=parity, data__eval_split="test")
        (example,) = read_split(checked(config), "eval")
        assert "".join(item["text"] for item in example.profile) == order


def test_where_data_are_looked_for(tmp_path: Path):
    config = config_of("LaMP_4", Path())
    config.data.path = ""
    assert data_directory(Settings.of(config)) == Path("data/time/LaMP_4")
    config.data.time_based = False
    assert data_directory(Settings.of(config)) == Path("data/LaMP_4")
    config.data.path = "elsewhere"
    assert data_directory(Settings.of(config)) == Path("elsewhere")
    with pytest.raises(ConfigError, match=r"'elsewhere'; .* dev_questions.json and dev_outputs.js"):
        read_split(Settings.of(config), "eval")


CUSTOM = [
    {"user": 7, "input": "a b", "output": "c", "profile": [{"text": "x y z", "label": 3}]},
    {"user": "8", "input": "a b", "output": "c", "profile": [{"text": "x"}], "id": "named"},
    {"user": "8", "input": "a b", "output": "c", "profile": [{"title": "no text"}]},
    {"user": "8", "input": None, "output": "c", "profile": []},
    {"user": True, "input": "a", "output": "c", "profile": []},
    {"user": "8", "input": "a", "profile": []},
    {"user": "8", "input": "a", "output": "c", "profile": [], "id": "named"},
    {"user": "8", "input": "a", "output": "c", "profile": {"text": "x"}},
    ["no object"],
    {"user": "9", "input": "a", "output": "c", "profile": [{"text": "x", "date": "2001"}]},
]
PROBLEMS = {
    3: "profile item 0: the field 'text' is missing",
    4: "the field 'input' must be str, not NoneType",
    5: "the field 'user' must be str or int, not bool",
    6: "the field 'output' is missing, which other records have",
    7: "the id stands there more than once",
    8: "the field 'profile' must be list, not dict",
    9: "expected an object, found list",
    10: "not JSON: Expecting",
}


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    lines = [json.dumps(record) for record in CUSTOM]
    lines.insert(9, '{"user": "8", ')
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_bad_records_are_told_with_their_lines(custom: Path, capsys: pytest.CaptureFixture[str]):
    assert check_data(custom, TASKS["custom"]) == 2 * len(PROBLEMS)
    output = capsys.readouterr().out
    for line, problem in PROBLEMS.items():
        rows = output.splitlines()
        (said,) = [row for row in rows if re.match(f"  train.jsonl: line {line}[:,]", row)]
        assert problem in said
        assert said.count(f"line {line}") == 1
    assert "3 good records, 8 bad ones" in output
    assert "3 users" in output
    assert "3 history items, 2 different texts, 1 with a date" in output
    assert "history items of a record: 1 to 1, median 1, mean 1.0" in output
    assert "words of a history text: 1 to 5, median 1, mean 2.3" in output


def test_stopping_at_a_bad_record_is_the_default(custom: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"train\.jsonl: line 3, profile item 0: the field 'text'"):
        run(config_of("custom", custom), tmp_path / "run", "encode")
    with pytest.raises(InputError, match="bad records, listed above: 16;"):
        run(config_of("custom", custom), tmp_path / "run", "check_data")


@pytest.mark.slow
def test_bad_records_can_be_left_out_but_are_listed(
    custom: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of("custom", custom, data__on_error="skip", methods=("none", "recency"))
    run(config, custom / "run", MODE)
    lines = (custom / "run" / "bad_records.jsonl").read_text().splitlines()
    listed = {line["line"]: line for line in map(json.loads, lines)}
    assert listed.keys() == PROBLEMS.keys()
    for line, problem in PROBLEMS.items():
        assert listed[line]["file"].endswith("dev.jsonl")
        assert problem in f"{listed[line]['record']}: {listed[line]['problem']}"
    assert "bad records left out (config.data.on_error=skip): 8," in capsys.readouterr().out
    submitted = json.loads((custom / "run" / "predictions" / "dev.none.json").read_text())
    assert [gold["id"] for gold in submitted["golds"]] == ["1", "named", "10"]


def test_lamps_bad_records_can_be_left_out(tmp_path: Path):
    write_task(tmp_path, "LaMP_2", "dev", 6)
    questions = json.loads((tmp_path / "dev_questions.json").read_text())
    outputs = json.loads((tmp_path / "dev_outputs.json").read_text())
    del questions[1]["profile"][0]["tag"]
    outputs["golds"][2]["output"] = "no tag"
    outputs["golds"][3]["id"] = "stranger"
    write_split(tmp_path, "dev", questions, outputs)
    bad: list[DataError] = []
    examples = read(tmp_path, "dev", TASKS["LaMP_2"], on_bad=bad.append)
    assert [example.id for example in examples] == ["dev0", "dev4", "dev5"]
    said = "\n".join(map(str, bad))
    assert len(bad) == 5
    for part in (
        "id 'dev1', profile item 0: the field 'tag' is missing",
        "id 'dev2': the output 'no tag' is none of sci-fi, based on a book",
        "id 'dev2': it has no output",
        "id 'dev3': it has no output",
        "id 'stranger': it has no question",
    ):
        assert part in said


def test_splits_in_a_directory(tmp_path: Path):
    for split in ("dev", "train"):
        write_task(tmp_path, "LaMP_4", split, 1)
        write_task(tmp_path, "custom", split, 1)
    assert splits(tmp_path, TASKS["LaMP_4"]) == ["dev", "train"]
    for name in (
        "test.parquet",
        "a-00000-of-00002.parquet",
        "a-00001-of-00002.parquet",
        "b/x.parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert splits(tmp_path, TASKS["custom"])[:2] == ["dev", "train"]
    assert splits(tmp_path, TASKS["custom"])[-3:] == ["a", "b", "test"]


def test_a_tfds_data_set_is_read_as_its_files_are(tmp_path: Path):
    for split in ("train", "dev"):
        write_task(tmp_path / "files", "LaMP_4", split, 5)
    builder = tfds.builder("personal_texts/LaMP_4_time", data_dir=tmp_path / "tfds")
    manual = tfds.download.DownloadConfig(manual_dir=tmp_path / "files")
    builder.download_and_prepare(file_format="array_record", download_config=manual)
    prepared = config_of("LaMP_4", Path(builder.data_dir), methods=("none", "pplug"))
    assert list(read_split(Settings.of(prepared), "eval")) == list(
        read_split(Settings.of(config_of("LaMP_4", tmp_path / "files")), "eval")
    )


def test_download_fetches_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    served = tmp_path / "served"
    for split in ("train", "dev"):
        write_task(tmp_path / "made", "LaMP_2", split, 4)
        for kind in ("questions", "outputs"):
            path = served / "time" / "LaMP_2" / "new" / split / f"{split}_{kind}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "made" / path.name).rename(path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    config = config_of("LaMP_2", tmp_path / "data", data__base_url=url)
    run(config, tmp_path / "run", "download")
    server.shutdown()
    output = capsys.readouterr().out
    assert output.count("4 good records, 0 bad ones") == 2
    assert "output comedy: 1" in output
    assert [example.id for example in read_split(Settings.of(config), "train")] == [
        f"train{i}" for i in range(4)
    ]
    assert not (tmp_path / "run").exists()


def test_the_embedded_sample_has_one_task_and_no_files(tmp_path: Path):
    from configs import lamp5

    config = lamp5.get_config()
    assert data_directory(Settings.of(config)) is None
    with pytest.raises(ConfigError, match="the embedded sample needs no files"):
        run(config, tmp_path, "check_data")
    config.task = "LaMP_4"
    with pytest.raises(ConfigError, match="the embedded sample has no LaMP_4"):
        run(config, tmp_path, "train")


@pytest.mark.parametrize("name", ["anthology_titles", "debian_synopses"])
def test_real_files_are_read(name: str, real_texts: Path):
    path = real_texts / name / "small"
    task = TASKS["LaMP_5" if name == "anthology_titles" else "LaMP_4"]
    for split, count in (("train", 200), ("dev", 50)):
        examples = read(path, split, task)
        assert len(examples) == count
        assert all(len(example.profile) >= 5 and example.target for example in examples)
        for example in examples:
            assert len(task.query_text(example.input)) < len(example.input) - 20
        assert np.mean([len(task.item_text(e.profile[0]).split()) for e in examples]) > 20
