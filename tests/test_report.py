"""The report's page: its parts, its numbers, and that no user's text is ever live."""

import base64
import csv
import hashlib
import importlib
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pplug_jax.data import submission
from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import InputError
from pplug_jax.report.__main__ import main
from pplug_jax.report.explorer import principal_plane
from pplug_jax.report.page import report
from pplug_jax.report.runs import read_examples, read_run
from pplug_jax.report.scores import length_bins
from tests.support.lamp_files import write_split

if TYPE_CHECKING:
    import playwright.sync_api as playwright

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> {{7*7}} \u2028 & ' \""
LENGTHS = (0, 1, 1, 2, 2, 3, 5, 8)
SCORE = {"value": 0.5, "low": 0.4, "high": 0.6}
Answers = dict[str, Sequence[str]]


class Page(HTMLParser):
    """A page's tags and ids, what its attributes refer to, and its scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text("utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(self.text)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if data.strip() and self.tags[-1] != "style":
            (self.scripts if self.tags[-1] == "script" else self.words).append(data)

    def of(self, *names: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name in names]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_workdir(
    root: Path,
    answers: Answers,
    *,
    golds: Sequence[str] | None = tuple(f"gold {i}" for i in range(8)),
    task: str = "LaMP_5",
    config_file: str = "lamp5",
    item: dict[str, str] | None = None,
    text: str = "",
    seeds: tuple[int, ...] = (),
    top_k: int = 1,
) -> Path:
    """A workdir as a run leaves it, on data of users with LENGTHS items; `text` is everywhere."""
    item = item or {"title": f"T {text}", "abstract": f"A {text}"}
    ids = [f"{i}{text}" for i in range(len(LENGTHS))]
    questions = [
        {
            "id": id,
            "user_id": f"user {id}",
            "input": f"input {i} {text}",
            "profile": [{"id": f"{i}-{k}"} | item for k in range(length)],
        }
        for i, (id, length) in enumerate(zip(ids, LENGTHS, strict=True))
    ]
    outputs = golds and [{"id": id, "output": gold} for id, gold in zip(ids, golds, strict=True)]
    split = "dev" if golds else "test"  # which may lack its outputs
    data = write_split(
        root / "data", split, questions, outputs and {"task": task, "golds": outputs}
    )
    config = importlib.import_module(f"configs.{config_file}").get_config()
    config.data.path = str(data)
    config.data.eval_split = split
    config.eval.bootstrap_samples = 50
    config.eval.top_k = top_k
    workdir = root / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json())
    metrics = TASKS[task].metrics if golds else ()
    results: dict[str, Any] = {
        "task": task,
        "data": str(data),
        "llm": "tiny",
        "split": split,
        "n": len(LENGTHS),
        "methods": {
            name: {"step": None} | {metric: dict(SCORE) for metric in metrics} for name in answers
        },
    }
    if seeds:
        results["seeds"] = list(seeds)
    write_results(workdir, results)
    for seed in seeds or [None]:
        folder = workdir if seed is None else workdir / f"seed_{seed}"
        for name, texts in answers.items():
            path = folder / "predictions" / f"{split}.{name}.json"
            submission.write(path, TASKS[task], dict(zip(ids, texts, strict=True)))
    return workdir


def write_results(workdir: Path, results: dict[str, Any]) -> None:
    (workdir / "results.json").write_text(json.dumps(results))


def read_results(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text())


def write_personas(
    folder: Path, method: str, lengths: Sequence[int] = LENGTHS, split: str = "dev"
) -> np.ndarray:
    """Weights 0, 1, 2, ..., the other input's 100, 101, ..., which is each history's last item."""
    total = sum(lengths)
    persona = np.random.default_rng(0).normal(size=(len(lengths), 6)).astype(np.float32)
    path = folder / "personas" / f"{split}.{method}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        lengths=np.array(lengths),
        weights=np.arange(total, dtype=np.float32),
        other=100 + np.arange(total, dtype=np.float32),
        other_item=np.array(lengths) - 1,
        persona=persona,
    )
    return persona


def right(places: Sequence[int], golds: Sequence[str] | None = None) -> list[str]:
    """The gold at these places, words that no gold has elsewhere."""
    golds = golds or [f"gold {i}" for i in range(8)]
    return [gold if i in places else "nothing alike" for i, gold in enumerate(golds)]


ANSWERS = {"none": right([0, 3]), "bm25": right([0, 1, 2]), "pplug": right(range(8))}


def test_the_page_has_all_parts_and_refers_to_nothing_but_its_own_files(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    results = read_results(workdir) | {"facts": {"commit": "abc123", "devices": "8 x made up"}}
    results["methods"]["pplug"] |= {
        "about": "the whole history",
        "trainable": 4816896,
        "bytes_per_user": 16384.0,
        "prompt_tokens": 217.0,
        "train_seconds": 321.0,
        "milliseconds": 12.5,
        "style": {"value": 0.125, "low": 0.1, "high": 0.2},
        "learning_rate": 0.01,
        "versus": {
            "none": {"rouge1": {"difference": 0.75, "low": 0.5, "high": 1.0, "p_value": 0.01}}
        },
    }
    write_results(workdir, results)
    write_personas(workdir, "pplug")
    losses = [{"step": 20, "name": "pplug/loss", "value": 2.5}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))

    path = report([workdir])
    assert path == workdir / "report" / "index.html"
    page = Page(path)
    parts = {"results", "training", "history", "retrieved", "users", "map", "facts"}
    assert parts <= set(page.of("id"))
    words = " ".join(" ".join(page.words).split())
    for told in (
        "0.500 [0.400, 0.600]",
        "+0.750 [+0.500, +1.000]",
        "4,816,896",
        "16,384",
        "217",
        "321",
        "12.5",
        "0.125 [0.100, 0.200]",
        "the whole history",
        "abc123",
        "8 x made up",
        "data.max_history",
        "trainable parameters",
    ):
        assert told in words

    references = page.of("href", "src")
    files = {each for each in references if not each.startswith(("#", "data:"))}
    assert files == {
        f"{name}.{end}"
        for name in ("results", "losses", "history_length", "map")
        for end in ("png", "csv")
    }
    assert all((path.parent / file).stat().st_size for file in files)
    assert "@import" not in page.text
    assert not re.search(r"url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", page.text)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in " ".join(page.of("content"))


def test_columns_that_no_method_has_are_left_out(tmp_path: Path) -> None:
    words = " ".join(Page(report([make_workdir(tmp_path, ANSWERS, seeds=(0,))])).words)
    assert "Trained with the seed 0." in words
    for absent in (
        "trainable",
        "bytes per user",
        "training, s",
        "style",
        "against none",
        "sd of",
    ):
        assert absent not in words


def test_scores_by_history_length_are_those_of_the_users_in_the_bins(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    path = report([workdir])
    found = {
        (row["metric"], row["method"], row["items"]): float(row["value"])
        for row in rows_of(path.parent / "history_length.csv")
    }
    # Users 0 to 2 have up to 1 item, 3 and 4 have 2, 5 has 3, 6 and 7 have more.
    expected = {
        "none": {"0–1": 1 / 3, "2": 1 / 2, "3": 0, "5–8": 0},
        "bm25": {"0–1": 1, "2": 0, "3": 0, "5–8": 0},
        "pplug": {"0–1": 1, "2": 1, "3": 1, "5–8": 1},
    }
    assert found == pytest.approx(
        {
            (metric, name, items): value
            for metric in ("rouge1", "rougeL")
            for name, values in expected.items()
            for items, value in values.items()
        }
    )
    page = Page(path)
    assert page.data["bins"] == ["0–1", "2", "3", "5–8"]
    assert page.data["lengths"]["rouge1"]["bm25"][0] == {"value": 1, "low": 1, "high": 1}


@pytest.mark.parametrize(
    ("lengths", "names"),
    [
        ([4] * 9, ["4"]),
        ([0, 0, 0, 7], ["0", "7"]),
        (range(100), ["0–24", "25–49", "50–74", "75–99"]),
        ([3], ["3"]),
    ],
)
def test_length_bins_are_quarters_or_fewer(lengths: Sequence[int], names: list[str]) -> None:
    bins = length_bins(np.array(lengths))
    assert [each.name for each in bins] == names
    assert sorted(np.concatenate([each.members for each in bins])) == list(range(len(lengths)))


def test_retrieval_is_drawn_over_top_k_of_several_workdirs(tmp_path: Path) -> None:
    for top_k in (1, 4):
        root = tmp_path / str(top_k)
        root.mkdir()
        workdir = make_workdir(root, ANSWERS, top_k=top_k)
        results = read_results(workdir) | {"data": "the same"}
        results["methods"]["bm25"]["rouge1"] = dict.fromkeys(SCORE, top_k / 10)
        write_results(workdir, results)
    workdirs = [tmp_path / str(top_k) / "run" for top_k in (4, 1)]

    path = report(workdirs)
    rows = [row for row in rows_of(path.parent / "top_k.csv") if row["metric"] == "rouge1"]
    assert [(row["method"], row["top_k"], row["value"]) for row in rows] == [
        ("bm25", "1", "0.1"),
        ("bm25", "4", "0.4"),
    ]
    assert (path.parent / "top_k.png").is_file()
    results = rows_of(path.parent / "results.csv")
    assert {row["workdir"] for row in results} == {str(each) for each in workdirs}

    path = report(workdirs[1:])
    assert "--config.eval.top_k" in " ".join(Page(path).words)
    assert not (path.parent / "top_k.csv").exists()


def test_seeds_are_averaged_in_the_bins_and_drawn_as_curves_of_their_own(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS, seeds=(3, 5))
    for seed, places in ((3, []), (5, [5])):
        folder = workdir / f"seed_{seed}"
        ids = [str(i) for i in range(8)]
        answers = dict(zip(ids, right(places), strict=True))
        submission.write(folder / "predictions" / "dev.pplug.json", TASKS["LaMP_5"], answers)
        lines = [
            {"step": step, "name": name, "value": value}
            for step, name, value in (
                (20, "pplug/loss", 9.0),
                (20, "pplug/grad_norm", 1.0),
                (40, "pplug/loss", seed / 2),
                (20, "pplug/loss", float(seed)),  # taken again after a stop
                (20, "k16/loss", 1.0),  # trained in another run
            )
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    results = read_results(workdir)
    results["methods"]["pplug"]["rouge1"]["seeds"] = [0.45, 0.55]
    write_results(workdir, results)

    path = report([workdir])
    page = Page(path)
    assert page.data["losses"] == {
        "pplug": [[[20, 3.0], [40, 1.5]], [[20, 5.0], [40, 2.5]]],
        "k16": [[[20, 1.0]], [[20, 1.0]]],
    }
    assert page.data["methods"] == [*results["methods"], "k16"]
    assert [list(row.values()) for row in rows_of(path.parent / "losses.csv")] == [
        ["pplug", "3", "20", "3.0"],
        ["pplug", "3", "40", "1.5"],
        ["pplug", "5", "20", "5.0"],
        ["pplug", "5", "40", "2.5"],
        ["k16", "3", "20", "1.0"],
        ["k16", "5", "20", "1.0"],
    ]
    values = [score["value"] for score in page.data["lengths"]["rouge1"]["pplug"]]
    assert values == [0, 0, 0.5, 0]
    # The users are those of the first seed.
    assert page.data["explorer"]["examples"][5]["outputs"]["pplug"] == "nothing alike"
    assert "0.071" in " ".join(page.words)
    row = next(r for r in rows_of(path.parent / "results.csv") if r["method"] == "pplug")
    assert row["seeds"] == "0.45 0.55"


def test_users_have_their_texts_scores_and_weights(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    persona = write_personas(workdir, "pplug")
    path = report([workdir])
    explorer = Page(path).data["explorer"]
    empty, fourth = explorer["examples"][0], explorer["examples"][3]
    assert empty["items"] == [] and empty["weights"]["pplug"]["other"] is None
    assert fourth["user"] == "user 3" and fourth["input"] == "input 3 "
    assert fourth["gold"] == "gold 3" and fourth["outputs"]["bm25"] == "nothing alike"
    assert fourth["scores"] == {"none": [1, 1], "bm25": [0, 0], "pplug": [1, 1]}
    # Histories of 0, 1 and 1 items come before it.
    assert fourth["weights"] == {"pplug": {"own": [2, 3], "other": [102, 103], "item": 1}}
    assert [item["text"] for item in fourth["items"]] == ["T A", "T A"]

    plane = explorer["maps"]["pplug"]
    assert plane["gain"] == [0, 1, 1, 0, 1, 1, 1, 1]
    rows = rows_of(path.parent / "map.csv")
    assert [[float(row["x"]), float(row["y"])] for row in rows] == plane["points"]
    assert [row["items"] for row in rows] == [str(length) for length in LENGTHS]
    centred = persona - persona.mean(axis=0)
    spread = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    np.testing.assert_allclose(np.square(plane["points"]).sum(axis=0), spread[:2], rtol=1e-3)


def test_users_have_losses_and_the_style_of_answers(tmp_path: Path) -> None:
    answers = {"none": ["t"] * 8, "pplug": ["T"] * 8}
    workdir = make_workdir(tmp_path, answers, item={"title": "T", "abstract": "A"})
    results = read_results(workdir)
    for name, entry in results["methods"].items():
        entry["style"] = SCORE
        losses = [[i * len(name), 2] for i in range(8)]
        path = workdir / "predictions" / f"dev.{name}.about.json"
        path.write_text(json.dumps({"losses": losses}))
    write_results(workdir, results)

    data = Page(report([workdir])).data
    assert data["explorer"]["scored"] == ["rouge1", "rougeL", "loss", "style"]
    empty, fourth = data["explorer"]["examples"][0], data["explorer"]["examples"][3]
    assert empty["scores"]["pplug"][2:] == [0, None]  # nothing to compare the style with
    assert [fourth["scores"][name][2] for name in answers] == [6, 7.5]
    # The case of the first letter, and so the share of words with a capital, of 16 entries.
    assert [fourth["scores"][name][3] for name in answers] == pytest.approx([2 * 3 / 16, 0])
    assert [score["value"] for score in data["lengths"]["loss"]["none"]] == [2, 7, 10, 13]
    assert [item["answer"] for item in fourth["items"]] == ["T", "T"]

    path.unlink()
    data = Page(report([workdir])).data
    assert data["explorer"]["scored"] == ["rouge1", "rougeL", "style"]


def test_an_answer_that_ends_an_item_is_not_cut_off(tmp_path: Path) -> None:
    item = {"text": "long " * 99, "title": "The end"}
    workdir = make_workdir(tmp_path, ANSWERS, task="LaMP_4", config_file="lamp4", item=item)
    shown = Page(report([workdir])).data["explorer"]["examples"][1]["items"][0]
    assert shown["text"].startswith("long long") and len(shown["text"]) < 320
    assert shown["text"].endswith("\N{HORIZONTAL ELLIPSIS} The end")


def write_shown(workdir: Path, method: str, shown: Sequence[Sequence[int]]) -> None:
    path = workdir / "predictions" / f"dev.{method}.about.json"
    path.write_text(json.dumps({"losses": [[1, 1]] * len(LENGTHS), "shown": shown}))


def test_items_that_a_prompt_shows_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    write_shown(workdir, "none", [[]] * 8)
    write_shown(workdir, "bm25", [[], [0], [0], [1], [1], [2], [4], [3, 7]])
    examples = Page(report([workdir])).data["explorer"]["examples"]
    assert [item["prompts"] for item in examples[4]["items"]] == [[], ["bm25"]]
    assert [item["place"] for item in examples[7]["items"] if item["prompts"]] == [3, 7]
    # Of a history longer than the page shows, such items stay beside the heaviest or newest.
    monkeypatch.setattr("pplug_jax.report.explorer.MAX_ITEMS", 4)
    write_shown(workdir, "none", [[]] * 7 + [[0, 1, 2, 4]])
    last = Page(report([workdir])).data["explorer"]["examples"][7]["items"]
    assert [item["place"] for item in last] == [0, 1, 6, 7]
    write_shown(workdir, "none", [[]] * 8)
    # A plug reads the newest items alone: places are counted among them.
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["max_history"] = 2
    (workdir / "config.json").write_text(json.dumps(config))
    last = Page(report([workdir])).data["explorer"]["examples"][7]["items"]
    assert [(item["place"], item["prompts"]) for item in last] == [(0, []), (1, ["bm25"])]


@pytest.mark.slow
def test_a_browser_shows_what_a_user_wrote_and_what_a_prompt_shows(
    tmp_path: Path, browser: "playwright.Page"
) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    write_shown(workdir, "bm25", [[], [0], [0], [1], [1], [2], [4], [3, 7]])
    browser.goto(report([workdir]).as_uri())
    browser.get_by_label("Find a user").fill("user 3")
    browser.locator("#found button").click()
    assert browser.locator("#user .items b").all_text_contents() == ["T", "T"]
    marks = browser.locator("#user .items .asked")
    assert marks.all_text_contents() == ["in the prompt of bm25:"]
    browser.get_by_label("Method 2").select_option("none")
    assert marks.all_text_contents() == []


def test_the_plane_of_points_on_a_line_is_that_line() -> None:
    places = np.array([-2.0, -1.0, 3.0])
    points, shares = principal_plane(places[:, None] * np.array([0.6, 0.0, -0.8]))
    np.testing.assert_allclose(points, np.stack([places, 0 * places], axis=1), atol=1e-12)
    assert shares == pytest.approx([1, 0])
    assert principal_plane(np.ones((1, 4)))[0].tolist() == [[0, 0]]


def test_no_text_of_a_user_is_live(tmp_path: Path) -> None:
    golds = [HOSTILE] * 8
    workdir = make_workdir(tmp_path, {"none": [HOSTILE] * 8}, golds=golds, text=HOSTILE)
    results = read_results(workdir) | {"facts": {HOSTILE: HOSTILE}, "llm": HOSTILE}
    results["methods"]["none"]["about"] = HOSTILE
    write_results(workdir, results)
    page = Page(report([workdir]))
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<img" not in page.text
    assert "\u2028" not in page.scripts[0]
    assert not re.search("[<>&]", page.scripts[0])
    example = page.data["explorer"]["examples"][1]
    assert HOSTILE in example["id"] and HOSTILE in example["user"] and HOSTILE in example["input"]
    assert HOSTILE in example["items"][0]["text"]
    assert example["gold"] == example["outputs"]["none"] == HOSTILE
    assert any("{{7*7}}" in text for text in page.words)
    # The script builds the page from nodes and texts only.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|srcdoc",
        page.scripts[1],
    )


def test_large_splits_and_long_histories_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pplug_jax.report.runs.MAX_EXAMPLES", 3)
    monkeypatch.setattr("pplug_jax.report.explorer.MAX_ITEMS", 2)
    monkeypatch.setattr("pplug_jax.report.explorer.MAX_ITEM_TEXT", 3)
    workdir = make_workdir(tmp_path, ANSWERS, text="long")
    page = Page(report([workdir]))
    examples = page.data["explorer"]["examples"]
    assert [example["id"] for example in examples] == ["0long", "4long", "7long"]
    assert [example["length"] for example in examples] == [0, 2, 8]
    # Without weights the newest items, with weights the heaviest.
    assert [item["place"] for item in examples[2]["items"]] == [6, 7]
    assert examples[2]["items"][0]["text"] == "T \N{HORIZONTAL ELLIPSIS}"
    assert "3 of the 8 examples" in " ".join(" ".join(page.words).split())

    write_personas(workdir, "pplug")
    arrays = dict(np.load(workdir / "personas" / "dev.pplug.npz"))
    arrays["weights"][-8:] = arrays["other"][-8:] = [0, 9, 0, 0, 5, 0, 0, 0]
    arrays["other_item"][-1] = 0
    np.savez(workdir / "personas" / "dev.pplug.npz", **arrays)
    last = Page(report([workdir])).data["explorer"]["examples"][2]
    assert [item["place"] for item in last["items"]] == [0, 1]  # the other input's is always shown
    assert last["weights"]["pplug"]["own"] == [0, 9]


def test_a_task_with_labels_has_classes_and_no_macro_f1_of_one_user(tmp_path: Path) -> None:
    labels = TASKS["LaMP_2"].labels
    golds = [labels[i % 2] for i in range(8)]
    answers = {"none": [labels[0]] * 8, "pplug": right([1, 2], golds)}
    item = {"description": "D", "tag": "comedy"}
    workdir = make_workdir(
        tmp_path, answers, golds=golds, task="LaMP_2", config_file="lamp2", item=item
    )
    write_personas(workdir, "pplug")
    data = Page(report([workdir])).data
    assert data["metrics"] == ["accuracy", "macro_f1"]
    assert set(data["lengths"]) == {"accuracy", "macro_f1"}
    assert data["explorer"]["scored"] == ["accuracy"] and data["explorer"]["classes"]
    assert data["explorer"]["examples"][1]["items"][0]["text"] == "D tag: comedy"


@pytest.mark.filterwarnings("ignore:overflow")
def test_an_error_is_a_gain_where_it_is_smaller(tmp_path: Path) -> None:
    item = {"text": "X", "score": "4"}
    golds = ["3"] * 8
    answers = {"none": ["5"] * 8, "pplug": ["4"] * 7 + ["1" + "0" * 200]}
    workdir = make_workdir(
        tmp_path, answers, golds=golds, task="LaMP_3", config_file="lamp3", item=item
    )
    write_personas(workdir, "pplug")
    data = Page(report([workdir])).data
    assert data["explorer"]["maps"]["pplug"]["gain"][:7] == [1] * 7
    assert data["explorer"]["examples"][7]["scores"]["pplug"][1] is None  # infinite
    assert {"mae", "rmse"} <= set(data["lower"])


def test_withheld_outputs_are_shown_without_scores(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS, golds=None)
    write_personas(workdir, "pplug", split="test")
    path = report([workdir])
    page = Page(path)
    assert "Nothing is scored" in " ".join(page.words)
    example = page.data["explorer"]["examples"][1]
    assert example["gold"] is None and example["outputs"]["pplug"] == "gold 1"
    assert "gain" not in page.data["explorer"]["maps"]["pplug"]
    assert not (path.parent / "history_length.csv").exists()


def test_a_workdir_without_its_data_still_has_its_results(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    (tmp_path / "data" / "dev_questions.json").unlink()
    page = Page(report([workdir]))
    assert page.data["explorer"] is None
    words = " ".join(page.words)
    assert "0.500" in words and "The data could not be read" in words


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_what_is_no_evaluated_workdir_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    (workdir / name).unlink()
    with pytest.raises(SystemExit, match=rf"^error: .*{name} is missing.*--mode=evaluate"):
        main(["report", str(workdir)])
    (workdir / name).write_text("{")
    with pytest.raises(InputError, match=f"{name} is no JSON.*evaluate again"):
        report([workdir])
    (workdir / name).write_text("{}")
    with pytest.raises(InputError, match="no results of a known task: evaluate again"):
        report([workdir])


def test_a_config_without_a_field_that_is_read_is_of_an_older_version(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    refused = []
    for part in ("data", "eval"):
        for field in config[part]:
            rest = {key: value for key, value in config[part].items() if key != field}
            path.write_text(json.dumps(config | {part: rest}))
            try:
                read_examples(read_run(workdir))
            except InputError as error:
                assert f"config.json has no {part}.{field}: the workdir was made by an older" in (
                    str(error)
                )
                assert "run the command again with a new --workdir" in str(error)
                refused.append(field)
    assert {"max_history", "history_labels", "top_k", "bootstrap_samples"} <= set(refused)
    assert "batch_size" not in refused


def test_files_of_other_examples_are_told(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, ANSWERS)
    write_personas(workdir, "pplug", [1] * 8)
    words = " ".join(Page(report([workdir])).words)
    assert "dev.pplug.npz is of other histories than the data's: evaluate again" in words
    submission.write(workdir / "predictions" / "dev.none.json", TASKS["LaMP_5"], {"0": "x"})
    words = " ".join(Page(report([workdir])).words)
    assert "has no answer to id '1': evaluate again" in words
