"""The task table: a row says what a task's texts are, how they look in prompts, what is scored."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark's task.

    Attributes:
        name: the task's name in its files.
        metrics: names of its scores (`metrics.METRICS`). The first decides comparisons; none if
            only a judge can score.
        fields: the texts that a profile item must have.
        history: the item's fields as the encoder reads them.
        demonstrations: the item in a retrieval prompt; the first pattern whose fields the item has.
        cut: the field that is cut where space is short.
        prompt: demonstrations and input together; `{before}` and `{after}` are the input up to the
            word `inserted_after` and the rest.
        query: a pattern whose groups are the user's own text in the input, without the instruction.
        labels: all valid outputs, if they are few.
        optional: the texts that a profile item may have.
        label: the item's field that holds what the user chose (a tag, a score).
        label_text: the label as the encoder reads it.
        document: the item's fields as retrieval reads them, if they differ from `history`.
        retrieval_query: the pattern of the query for retrieval, if it differs from `query`.
        joint: stands between two demonstrations.
        inserted_after: the word of the input that demonstrations follow.
        question: the pattern of an item as an input of its own, if items are like inputs.
        answer: the item's field that is what the output is; empty if none is.
        answers: the fields that it may be where only the data say which; see `learnt`.
        questions_and_outputs: whether a split has LaMP's two files; otherwise it has one.
        input_key: the field of the input, in one file a split.
        output_key: the field of the output, which may be missing.
        user_key: the field of the user.
        judged: fields of a record that its judge needs.
    """

    name: str
    metrics: tuple[str, ...]
    fields: tuple[str, ...]
    history: tuple[str, ...]
    demonstrations: tuple[str, ...]
    cut: str
    prompt: str
    query: str = r"(.*)"
    labels: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    label: str = ""
    label_text: str = ""
    document: tuple[str, ...] = ()
    retrieval_query: str = ""
    joint: str = ", and "
    inserted_after: str = ""
    question: str = ""
    answer: str = ""
    answers: tuple[str, ...] = ()
    questions_and_outputs: bool = True
    input_key: str = "input"
    output_key: str = "output"
    user_key: str = "user_id"
    judged: tuple[str, ...] = ()

    def query_text(self, input: str) -> str:
        """Return what the plug compares with the history; an unfitting input is read whole."""
        return _groups(self.query, input)

    def retrieval_text(self, input: str) -> str:
        """Return what retrieval compares with the history."""
        return _groups(self.retrieval_query or self.query, input)

    def item_text(self, item: dict[str, Any], label: bool = True) -> str:
        """Return the item as the encoder reads it, with its label or without."""
        texts = [item.get(field) for field in self.history]
        if label and self.label and item.get(self.label):
            texts.append(self.label_text.format(**item))
        return _joined(texts)

    def document_text(self, item: dict[str, Any]) -> str:
        """Return the item as retrieval reads it."""
        return _joined([item.get(field) for field in self.document or self.history])

    def learnt(self, answer: str, instruction: str) -> "Task":
        """Return the task with what its data say.

        Args:
            answer: the field of an item that is what the output is.
            instruction: what every input begins with. Behind it follows what an item has in `cut`.
        """
        before = instruction.replace("{", "{{").replace("}", "}}")
        return dataclasses.replace(
            self,
            answer=answer,
            question=f"{before}{{{self.cut}}}" if answer not in ("", self.cut) else "",
            query=f"^{re.escape(instruction)}(.*)",
        )

    def own_example(self, item: dict[str, Any]) -> tuple[str, str]:
        """Return the item as an input and its output."""
        question = self.question.format(labels=", ".join(self.labels), **item)
        return question, item[self.answer]

    def demonstration(self, item: dict[str, Any]) -> str:
        """Return the item as it stands in a prompt."""

        def fits(pattern: str) -> bool:
            return all(map(item.get, {*re.findall(r"{(\w+)}", pattern)} - {self.cut}))

        return next(filter(fits, self.demonstrations), self.demonstrations[-1]).format(**item)

    def demonstration_prompt(self, demonstrations: Sequence[str], input: str) -> str:
        """Return the input with demonstrations; alone, if it lacks the word that they follow."""
        place = input.find(self.inserted_after)
        if place < 0:
            return input
        place += len(self.inserted_after)
        return self.prompt.format(
            demonstrations=self.joint.join(demonstrations),
            input=input,
            before=input[:place],
            after=input[place:],
        )


def _groups(pattern: str, input: str) -> str:
    match = re.search(pattern, input, re.DOTALL)
    return _joined(match.groups()) if match else input.strip()


def _joined(texts: Sequence[str | None]) -> str:
    return " ".join(text.strip() for text in texts if text and text.strip())


ROUGE = ("rouge1", "rougeL")
LONG = (*ROUGE, "meteor")
TITLED_TEXT = '"{title}" is the title for "{text}" '
PATTERNS = "{demonstrations}. Following the given patterns {input}"

# LaMP (arXiv 2304.11406) and its published prompts; the history texts are PPlug's, and LaMP-6's by
# analogy with LaMP-4.
_LAMP = (
    Task(
        name="LaMP_1",
        metrics=("accuracy", "macro_f1"),
        labels=("[1]", "[2]"),
        fields=("title", "abstract"),
        history=("title", "abstract"),
        query=r'paper with the title "(.*)", which reference is related\?',
        retrieval_query=r'\[1\]: "(.*)" \[2\]: "(.*)"\s*$',
        demonstrations=('"{title}"',),
        cut="title",
        prompt="{before}, and {demonstrations}{after}",
        inserted_after="title",
    ),
    Task(
        name="LaMP_2",
        metrics=("accuracy", "macro_f1"),
        labels=(
            "sci-fi",
            "based on a book",
            "comedy",
            "action",
            "twist ending",
            "dystopia",
            "dark comedy",
            "classic",
            "psychology",
            "fantasy",
            "romance",
            "thought-provoking",
            "social commentary",
            "violence",
            "true story",
        ),
        fields=("description", "tag"),
        label="tag",
        label_text="tag: {tag}",
        history=("description",),
        query=r"description:(.*)",
        demonstrations=('the tag for the movie: "{description}" is "{tag}" ',),
        cut="description",
        prompt="{demonstrations}. {input}",
        question="Which tag does this movie relate to among the following tags? Just answer with "
        "the tag name without further explanation. tags: [{labels}] description: {description}",
        answer="tag",
    ),
    Task(
        name="LaMP_3",
        metrics=("mae", "rmse"),
        labels=("1", "2", "3", "4", "5"),
        fields=("text", "score"),
        label="score",
        label_text="score: {score}",
        history=("text",),
        query=r"review:(.*)",
        demonstrations=('{score} is the score for "{text}" ',),
        cut="text",
        prompt="{demonstrations}. {input}",
        question="What is the score of the following review on a scale of 1 to 5? just answer with "
        "1, 2, 3, 4, or 5 without further explanation. review: {text}",
        answer="score",
    ),
    Task(
        name="LaMP_4",
        metrics=ROUGE,
        fields=("title", "text"),
        history=("text", "title"),
        document=("title", "text"),
        query=r"article:(.*)",
        demonstrations=(TITLED_TEXT,),
        cut="text",
        prompt="{demonstrations}. {input}",
        question="Generate a headline for the following article: {text}",
        answer="title",
    ),
    Task(
        name="LaMP_5",
        metrics=ROUGE,
        fields=("title", "abstract"),
        history=("title", "abstract"),
        query=r"paper:(.*)",
        demonstrations=('"{title}" is a title for "{abstract}" ',),
        cut="abstract",
        prompt=PATTERNS,
        question="Generate a title for the following abstract of a paper: {abstract}",
        answer="title",
    ),
    Task(
        name="LaMP_6",
        metrics=ROUGE,
        fields=("title", "text"),
        history=("text", "title"),
        document=("text",),
        query=r":(.*)",
        demonstrations=(TITLED_TEXT,),
        cut="text",
        prompt="{demonstrations}. {input}",
        question="Generate a subject for the following email: {text}",
        answer="title",
    ),
    Task(
        name="LaMP_7",
        metrics=ROUGE,
        fields=("text",),
        history=("text",),
        query=r"before or after it:(.*)",
        retrieval_query=r":(.*)",
        demonstrations=('"{text}" ',),
        cut="text",
        prompt="{demonstrations} are written by a person. Following the given patterns {input}",
        answer="text",
    ),
)

# LongLaMP (arXiv 2407.11016), named as its code names them, with the fields of its files.
_LONGLAMP = (
    Task(
        name="generation_abstract",
        metrics=LONG,
        fields=("title", "abstract"),
        history=("title", "abstract"),
        query=r"items:(.*)",
        demonstrations=('"{abstract}" is the abstract for the title "{title}"',),
        cut="abstract",
        prompt="{demonstrations}. Use the above abstracts as context to understand the style and "
        "language of the user and, {input}",
        questions_and_outputs=False,
        user_key="name",
        answer="abstract",
    ),
    Task(
        name="product_review_writing",
        metrics=LONG,
        fields=("reviewText",),
        optional=("summary", "description"),
        label="overall",
        label_text="rating: {overall}",
        history=("summary", "description", "reviewText"),
        document=("overall", "summary", "description", "reviewText"),
        demonstrations=(
            (
                '"{overall}" is a rating for the product with description "{description}". '
                '"{summary}" is summary for "{reviewText}" '
            ),
        ),
        cut="reviewText",
        prompt=PATTERNS,
        questions_and_outputs=False,
        user_key="reviewerId",
        answer="reviewText",
    ),
    Task(
        name="topic_writing",
        metrics=LONG,
        fields=("content",),
        optional=("summary",),
        history=("summary", "content"),
        demonstrations=('"{summary}" is a summary for "{content}" ',),
        cut="content",
        prompt="{demonstrations}. Following the given patterns, {input}",
        questions_and_outputs=False,
        user_key="author",
        answer="content",
    ),
    Task(
        name="email_generation",
        metrics=LONG,
        fields=("title", "text"),
        history=("text", "title"),
        document=("text",),
        query=r":(.*)",
        demonstrations=(TITLED_TEXT,),
        cut="text",
        prompt="{demonstrations}. {input}",
        answer="text",
    ),
)

_OTHERS = (
    # LaMP-QA (arXiv 2506.00137). Its records have no answer, only what a judge looks for; an
    # `output` that somebody adds can be trained on.
    Task(
        name="LaMP_QA",
        metrics=(),
        fields=("text",),
        history=("text",),
        demonstrations=("{text}",),
        cut="text",
        joint="\n\n",
        prompt="# Past post questions and detailed descriptions of these questions:\n"
        "{demonstrations}\n# Current post question:\n{input}\n",
        questions_and_outputs=False,
        input_key="question",
        judged=("narrative", "rubric_aspects"),
    ),
    # Your own users, docs/data.md.
    Task(
        name="custom",
        metrics=(*ROUGE, "exact_match", "exact_prefix"),
        fields=("text",),
        optional=("title",),
        label="label",
        label_text="label: {label}",
        history=("title", "text"),
        demonstrations=(
            '"{title}" is the title and "{label}" the label for "{text}" ',
            TITLED_TEXT,
            '"{label}" is the label for "{text}" ',
            '"{text}" ',
        ),
        cut="text",
        prompt=PATTERNS,
        questions_and_outputs=False,
        user_key="user",
        answers=("title", "label", "text"),
    ),
)

TASKS = {task.name: task for task in (*_LAMP, *_LONGLAMP, *_OTHERS)}
