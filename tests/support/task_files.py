"""An input and a profile item of each task, in its exact form, and files made of such."""

import json
from pathlib import Path
from typing import Any

from pplug_jax.data.tasks import TASKS
from tests.support.lamp_files import write_split

TAGS = ", ".join(TASKS["LaMP_2"].labels)
INPUTS = {
    "LaMP_1": 'For an author who has written the paper with the title "Deep "quoted", and more", '
    "which reference is related? Just answer with [1] or [2] without explanation. "
    '[1]: "One [1]: "x"" [2]: "Two"',
    "LaMP_2": "Which tag does this movie relate to among the following tags? Just answer with the "
    f"tag name without further explanation. tags: [{TAGS}] "
    "description: A film: description: of films.",
    "LaMP_3": "What is the score of the following review on a scale of 1 to 5? just answer with 1, "
    "2, 3, 4, or 5 without further explanation. review: Fine. review: no",
    "LaMP_4": "Generate a headline for the following article: An article: of \n two lines",
    "LaMP_5": "Generate a title for the following abstract of a paper: We measure paper: rivers.",
    "LaMP_6": "Generate a subject for the following email: Dear all: hello",
    "LaMP_7": "Paraphrase the following tweet without any explanation before or after it: so: "
    "tired",
    "generation_abstract": 'Generate an abstract for the title "T" using the following items: one, '
    "two",
    "product_review_writing": "Generate the review text written by a reviewer who has given an "
    'overall rating of "4.0" for a product with description "D". The summary is "S".',
    "topic_writing": "Generate the content for a post with the summary: S",
    "email_generation": "Complete the text of the following email. title: Lunch. text: Dear",
    "LaMP_QA": "Which tea?",
    "custom": "Write: a note",
}
ITEMS: dict[str, dict[str, str]] = {
    "LaMP_1": {"title": "T", "abstract": "A"},
    "LaMP_2": {"description": "D", "tag": "comedy"},
    "LaMP_3": {"text": "X", "score": "4"},
    "LaMP_4": {"title": "T", "text": "X"},
    "LaMP_5": {"title": "T", "abstract": "A"},
    "LaMP_6": {"title": "T", "text": "X"},
    "LaMP_7": {"text": "X"},
    "generation_abstract": {"title": "T", "abstract": "A"},
    "product_review_writing": {
        "overall": "4.0",
        "summary": "S",
        "description": "D",
        "reviewText": "R",
    },
    "topic_writing": {"summary": "S", "content": "C"},
    "email_generation": {"title": "T", "text": "X"},
    "LaMP_QA": {"text": "X"},
    "custom": {"text": "X", "title": "T", "label": "L"},
}


def write_task(directory: Path, name: str, split: str, count: int, *, outputs: bool = True) -> None:
    """Writes `count` questions of as many users, with long inputs and 0 to 3 history items."""
    task = TASKS[name]
    item, varied = ITEMS[name], task.fields[0]
    profiles = [
        [
            item
            | {varied: f"{item[varied]} {i} {k}", "id": f"{i}{k}", "date": f"201{k}-0{1 + i % 9}"}
            for k in range(i % 4)
        ]
        for i in range(count)
    ]
    golds = [
        task.labels[i % len(task.labels)] if task.labels else f"Gold {i}" for i in range(count)
    ]
    records: list[dict[str, Any]] = [
        {task.input_key: INPUTS[name] + " and so on" * 40 + f" {i}", "profile": profiles[i]}
        for i in range(count)
    ]
    if task.questions_and_outputs:
        questions = [{"id": f"{split}{i}"} | record for i, record in enumerate(records)]
        ids = [question["id"] for question in questions]
        answers = [{"id": id, "output": gold} for id, gold in zip(ids, golds, strict=True)]
        content = {"task": name, "golds": answers} if outputs else None
        write_split(directory, split, questions, content)
        return
    for i, record in enumerate(records):
        record |= {task.user_key: f"u{i}"} | {field: [{"aspect": "a"}] for field in task.judged}
        if outputs:
            record["output"] = golds[i]
    directory.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / f"{split}.jsonl").write_text(lines)
