"""Every task's texts, by hand: what is compared, what is encoded, what a prompt shows."""

import importlib

import pytest

from pplug_jax.config import PARITY, checked
from pplug_jax.data.tasks import TASKS
from pplug_jax.feed.retrieval import demonstration_prompt
from pplug_jax.methods.table import CONTROLS
from pplug_jax.scoring.metrics import METRICS
from tests.support.environment import ROOT
from tests.support.task_files import INPUTS, ITEMS


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_consistent(name: str):
    task = TASKS[name]
    known = {*task.fields, *task.optional, task.label}
    assert {*task.history, *task.document, *task.answers, task.cut} <= known
    assert task.answer in {*known, ""}
    assert task.cut in task.fields
    assert set(task.metrics) <= METRICS.keys()
    assert all(f"{{{task.cut}}}" in form for form in task.demonstrations)
    assert "{demonstrations}" in task.prompt
    assert bool(task.metrics) != bool(task.judged)


@pytest.mark.parametrize(
    ("task", "query", "retrieval"),
    [
        ("LaMP_1", 'Deep "quoted", and more', 'One [1]: "x" Two'),
        ("LaMP_2", "A film: description: of films.", None),
        ("LaMP_3", "Fine. review: no", None),
        ("LaMP_4", "An article: of \n two lines", None),
        ("LaMP_5", "We measure paper: rivers.", None),
        ("LaMP_6", "Dear all: hello", None),
        ("LaMP_7", "so: tired", None),
        ("generation_abstract", "one, two", None),
        ("product_review_writing", INPUTS["product_review_writing"], None),
        ("topic_writing", INPUTS["topic_writing"], None),
        ("email_generation", "Lunch. text: Dear", None),
        ("LaMP_QA", "Which tea?", None),
        ("custom", "Write: a note", None),
    ],
)
def test_queries(task: str, query: str, retrieval: str | None):
    assert TASKS[task].query_text(INPUTS[task]) == query
    assert TASKS[task].retrieval_text(INPUTS[task]) == (retrieval or query)


def test_an_input_of_another_form_is_compared_whole():
    # One of LaMP-2's published questions lacks its instruction.
    assert TASKS["LaMP_2"].query_text(" x A film. ") == "x A film."
    assert TASKS["LaMP_1"].query_text("A title") == "A title"


@pytest.mark.parametrize(
    ("task", "bare", "labelled", "document"),
    [
        ("LaMP_1", "T A", None, None),
        ("LaMP_2", "D", "D tag: comedy", None),
        ("LaMP_3", "X", "X score: 4", None),
        ("LaMP_4", "X T", None, "T X"),
        ("LaMP_5", "T A", None, None),
        ("LaMP_6", "X T", None, "X"),
        ("LaMP_7", "X", None, None),
        ("generation_abstract", "T A", None, None),
        ("product_review_writing", "S D R", "S D R rating: 4.0", "4.0 S D R"),
        ("topic_writing", "S C", None, None),
        ("email_generation", "X T", None, "X"),
        ("LaMP_QA", "X", None, None),
        ("custom", "T X", "T X label: L", None),
    ],
)
def test_items(task: str, bare: str, labelled: str | None, document: str | None):
    item = ITEMS[task]
    assert TASKS[task].item_text(item, label=False) == bare
    assert TASKS[task].item_text(item) == (labelled or bare)
    assert TASKS[task].document_text(item) == (document or bare)


def test_what_an_item_lacks_leaves_no_trace():
    custom = TASKS["custom"]
    assert custom.item_text({"text": " X ", "title": "", "label": ""}) == "X"
    assert custom.item_text({"text": "X"}) == "X"


LANGUAGE = "language of the user and"
FOLLOWING = ". Following the given patterns INPUT"


@pytest.mark.parametrize(
    ("task", "shown", "rest"),
    [
        ("LaMP_2", 'the tag for the movie: "D" is "comedy" ', ". INPUT"),
        ("LaMP_3", '4 is the score for "X" ', ". INPUT"),
        ("LaMP_4", '"T" is the title for "X" ', ". INPUT"),
        ("LaMP_5", '"T" is a title for "A" ', FOLLOWING),
        ("LaMP_6", '"T" is the title for "X" ', ". INPUT"),
        ("LaMP_7", '"X" ', " are written by a person" + FOLLOWING),
        (
            "generation_abstract",
            '"A" is the abstract for the title "T"',
            f". Use the above abstracts as context to understand the style and {LANGUAGE}, INPUT",
        ),
        (
            "product_review_writing",
            '"4.0" is a rating for the product with description "D". "S" is summary for "R" ',
            FOLLOWING,
        ),
        ("topic_writing", '"S" is a summary for "C" ', FOLLOWING.replace("terns", "terns,")),
        ("email_generation", '"T" is the title for "X" ', ". INPUT"),
        ("custom", '"T" is the title and "L" the label for "X" ', FOLLOWING),
    ],
)
def test_prompts_have_the_published_form(task: str, shown: str, rest: str, llama_tokenizer):
    items = [ITEMS[task]] * 2
    found = demonstration_prompt(TASKS[task], INPUTS[task], items, llama_tokenizer, 10_000)
    assert found == f"{shown}, and {shown}{rest}".replace("INPUT", INPUTS[task])


def test_citation_demonstrations_stand_inside_the_input(llama_tokenizer):
    task, items = TASKS["LaMP_1"], [ITEMS["LaMP_1"]] * 2
    before, after = INPUTS["LaMP_1"].split("title ")
    found = demonstration_prompt(task, INPUTS["LaMP_1"], items, llama_tokenizer, 10_000)
    assert found == f'{before}title, and "T", and "T" {after}'
    assert demonstration_prompt(task, "which?", items, llama_tokenizer, 99) == "which?"


def test_questions_stand_behind_past_posts(llama_tokenizer):
    items = [ITEMS["LaMP_QA"]] * 2
    assert demonstration_prompt(TASKS["LaMP_QA"], "Tea?", items, llama_tokenizer, 10_000) == (
        "# Past post questions and detailed descriptions of these questions:\nX\n\nX\n"
        "# Current post question:\nTea?\n"
    )


def test_custom_demonstrations_say_what_an_item_has():
    custom = TASKS["custom"]
    item = {"text": "X", "title": "", "label": ""}
    assert custom.demonstration(item) == '"X" '
    assert custom.demonstration(item | {"title": "T"}) == '"T" is the title for "X" '
    assert custom.demonstration(item | {"label": "L"}) == '"L" is the label for "X" '
    # Also while its length without the text is measured.
    assert custom.demonstration(item | {"title": "T", "text": ""}) == '"T" is the title for "" '


CONFIGS = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("common", "llms", "best")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_complete(name: str):
    get_config = importlib.import_module(f"configs.{name}").get_config
    for argument in ("embedded", "gemma3_1b", "flan_t5_xxl@v5e-8"):
        config = get_config(argument)
        checked(config)
        config.lock()
        config.parity = True
        flat = checked(config).flat()
        assert {field: flat[field] for field in PARITY} == PARITY
    assert {importlib.import_module(f"configs.{n}").get_config().task for n in CONFIGS} == {*TASKS}


@pytest.mark.parametrize("argument", [*CONFIGS, "lamp5:flan_t5_xxl@v5e-8", "custom:gemma3_1b"])
def test_the_best_is_a_tasks_config_with_other_methods_and_another_plug(argument: str):
    from configs import best

    config = best.get_config(argument)
    checked(config)
    task, *llm = argument.split(":")
    plain = importlib.import_module(f"configs.{task}").get_config(*llm)
    assert config.plug != plain.plug
    assert config.plug.place == ("front" if "t5" in argument else "behind")
    # Items that answer nothing; nothing to train on; items that may answer nothing.
    if config.task in ("LaMP_1", "LaMP_QA", "custom"):
        assert config.methods == plain.methods
    else:
        (plug,) = CONTROLS.keys() & set(config.methods)
        assert plug == "pplug+answers"
        assert set(CONTROLS[plug]) < set(config.methods)
    config.plug, config.methods, config.eval.top_k = plain.plug, plain.methods, plain.eval.top_k
    assert config == plain


def test_the_papers_settings():
    from configs import lamp3, lamp4

    paper = lamp4.get_config("flan_t5_xxl")
    assert (paper.train.epochs, paper.eval.max_new_tokens, paper.eval.num_beams) == (22, 128, 4)
    assert (paper.data.max_input_length, paper.data.max_history) == (256, 512)
    assert paper.data.time_based
    rating = lamp3.get_config("flan_t5_xxl")
    assert (rating.train.epochs, rating.eval.max_new_tokens) == (11, 10)
