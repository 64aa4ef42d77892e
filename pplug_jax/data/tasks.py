"""The task table: a row says what a task's texts are, how demonstrations look, what is scored."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """A LaMP task.

    name: as LaMP's files have it. fields: what a profile item must have. query_after: the mark in
    the input behind which the user's own text begins. history_text: a profile item as the encoder
    reads it. demonstration: a profile item in a retrieval prompt; its field `cut` gives way where
    space is short. prompt: demonstrations and input together. metrics: the keys of its scores, the
    first the one that runs are compared by.
    """

    name: str
    fields: tuple[str, ...]
    query_after: str
    history_text: str
    demonstration: str
    cut: str
    prompt: str
    metrics: tuple[str, ...]

    def query(self, input: str) -> str:
        """The input without its instruction: what pooler and retrieval compare with the history."""
        _, mark, text = input.partition(self.query_after)
        return text.strip() if mark else input.strip()

    def item_text(self, item: dict[str, Any]) -> str:
        return self.history_text.format(**item)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="LaMP_5",
            fields=("title", "abstract"),
            query_after="paper:",
            history_text="{title} {abstract}",
            demonstration='"{title}" is a title for "{abstract}" ',
            cut="abstract",
            prompt="{demonstrations}. Following the given patterns {input}",
            metrics=("rouge1", "rougeL"),
        ),
    )
}
