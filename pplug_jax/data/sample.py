"""The embedded sample: LaMP-5-shaped users, made up from word lists by a seed.

Every paper is a kind (method, study, resource, system) and a few content words. Its abstract tells
them in plain sentences that are drawn without regard to the user. Its title tells the same content
in the user's own style: one option of each of `STYLE`'s factors, fixed for the user and used
wherever the paper's kind allows it. So one input never reveals the style, one title reveals a part,
and a history nearly all of it. With more than 10^17 combinations no two users share a style, and
users unseen in training are new combinations.
"""

import itertools
import random
import re
from collections.abc import Iterator

from pplug_jax.data.lamp import Example

STYLE: dict[str, tuple[str, ...]] = {
    # wording
    "opener": ("", "towards", "on", "rethinking", "learning", "revisiting", "beyond"),
    "adjective": ("", "robust", "simple", "scalable", "principled", "frugal", "honest", "careful"),
    "article": ("", "a", "the", "one"),
    "instrument": ("with", "via", "using", "through", "by means of"),
    "purpose": ("for", "in", "to support", "at the service of", "meets"),
    "noun": ("approach", "framework", "method", "model", "recipe", "perspective", "scheme"),
    "source": ("", "from {data}", "on {data}", "over {data}", "inside {data}"),
    "condition": ("", "under {trouble}", "despite {trouble}", "in the face of {trouble}"),
    "task_form": ("{task}", "the {task} problem", "{task} tasks", "practical {task}"),
    "tail": (
        "",
        "at scale",
        "in practice",
        "made easy",
        "from scratch",
        "without tears",
        "in three steps",
    ),
    "study_noun": (
        "a case study",
        "an empirical look",
        "an audit",
        "lessons learned",
        "field notes",
        "a closer look",
    ),
    "study_verb": ("shape", "help", "limit", "change", "explain"),
    "evidence": ("", "evidence from {data}", "the case of {data}", "what {data} tell us"),
    "gain": (
        "the {quality} of",
        "better {quality} in",
        "{quality} and",
        "a question of {quality} in",
    ),
    "resource_noun": ("corpus", "benchmark", "collection", "dataset", "test bed", "archive"),
    "resource_adjective": ("", "open", "large", "new", "curated", "living"),
    "resource_verb": ("for", "to study", "to measure", "as a challenge in", "towards"),
    "system_noun": ("toolkit", "platform", "engine", "workbench", "service", "assistant"),
    "system_verb": ("serving", "running", "automating", "delivering", "supporting"),
    "audience": ("", "for analysts", "for everyone", "for small teams", "for public offices"),
    # structure
    "method_frame": ("task_first", "method_first", "colon", "phrase"),
    "study_frame": ("how", "noun_first", "question", "noun_last"),
    "resource_frame": ("noun_first", "data_first", "colon"),
    "system_frame": ("noun_first", "verb_first", "colon"),
    # look, which ROUGE does not see
    "casing": ("title", "sentence", "lower"),
    "separator": (": ", " - "),
}

TASKS = (
    "route planning", "crop forecasting", "image retrieval", "speech cleaning",
    "fraud screening", "text ranking", "fault diagnosis", "music tagging", "map matching",
    "demand pricing", "word alignment", "gene clustering", "motion capture", "stock control",
    "claim checking", "query rewriting", "scene labelling", "load balancing", "table parsing",
    "tutor matching", "signal tracing", "menu planning", "rumour detection", "shift scheduling",
)  # fmt: skip
METHODS = (
    "graph kernels", "tree transducers", "sparse codes", "random forests", "mixture models",
    "state machines", "spline filters", "memory networks", "rule grammars", "belief nets",
    "hash sketches", "tensor trains", "genetic search", "margin losses", "wave filters",
    "active queries", "logic programs", "prompt tables", "nearest neighbours", "causal graphs",
    "ensemble votes", "latent maps", "gradient flows", "game solvers",
)  # fmt: skip
DATA = (
    "court records", "tide tables", "museum catalogues", "bus logs", "patient notes",
    "weather charts", "bird calls", "tax forms", "school essays", "power meters",
    "harbour photos", "chess games", "soil samples", "radio shows", "parish books",
    "recipe cards",
)  # fmt: skip
TROUBLES = (
    "label noise", "missing values", "tight budgets", "sudden drift", "rare classes",
    "slow sensors", "weak supervision", "long delays",
)  # fmt: skip
QUALITIES = ("accuracy", "coverage", "speed", "fairness", "stability", "recall")

OPENINGS = (
    "Many people who handle {data} depend on {task}.",
    "{Task} is a daily need wherever {data} are kept.",
    "Those who keep {data} have long asked for better {task}.",
    "Work on {task} often begins with {data}.",
)
PROBLEMS = (
    "Yet {trouble} hurt the {quality} of current systems.",
    "Earlier work loses {quality} as soon as {trouble} appear.",
    "What stands in the way is {trouble}, and {quality} suffers.",
    "It is known that {trouble} reduce {quality}.",
)
BODIES = {
    "method": (
        "We propose to solve the task by {method}.",
        "This paper develops {method} that address it.",
        "Our solution builds on {method}.",
    ),
    "study": (
        "We ask what {method} contribute and measure it.",
        "This paper examines {method} in a set of trials.",
        "We compare variants of {method} and report the outcome.",
    ),
    "resource": (
        "We release annotated material, with {method} as a baseline.",
        "This paper publishes new annotations and tests {method} on them.",
        "We collect and share examples, which {method} find hard.",
    ),
    "system": (
        "We describe deployed software built around {method}.",
        "This paper presents a running installation that uses {method}.",
        "We report on software in operation, driven by {method}.",
    ),
}
CLOSINGS = (
    "Results on {data} show a clear gain.",
    "Tests show that {quality} improves.",
    "The outcome holds for {data} of several years.",
    "All material is available on request.",
)

INPUT = "Generate a title for the following abstract of a paper: {abstract}"


def title(style: dict[str, str], content: dict[str, str]) -> str:
    """The title that a user of `style` gives to a paper of `content`."""

    def fill(*parts: str) -> str:
        return " ".join(part.format(**content) for part in parts if part)

    s = style
    task = s["task_form"]
    sep = "\0"  # becomes the user's separator at the end, so that casing does not touch it
    match content["kind"], s[f"{content['kind']}_frame"]:
        case "method", "task_first":
            text = fill(
                s["opener"],
                s["adjective"],
                task,
                s["instrument"],
                "{method}",
                s["source"],
                s["tail"],
            )
        case "method", "method_first":
            text = fill(s["adjective"], "{method}", s["purpose"], task, s["condition"], s["tail"])
        case "method", "colon":
            text = fill(
                task,
                sep,
                s["article"],
                s["adjective"],
                s["noun"],
                s["instrument"],
                "{method}",
                s["condition"],
            )
        case "method", "phrase":
            text = fill(
                s["opener"],
                s["article"],
                s["adjective"],
                "{method}",
                s["noun"],
                s["purpose"],
                task,
                s["source"],
            )
        case "study", "how":
            text = fill(
                "how {method}",
                s["study_verb"],
                s["gain"],
                task,
                s["condition"],
                sep,
                s["study_noun"],
            )
        case "study", "noun_first":
            text = fill(
                s["study_noun"],
                "of {method}",
                s["purpose"],
                task,
                sep,
                s["evidence"] or s["tail"] or "results",
            )
        case "study", "question":
            text = fill("do {method}", s["study_verb"], s["gain"], task, "?", s["evidence"])
        case "study", "noun_last":
            text = fill("{method} and", s["gain"], task, sep, s["study_noun"], s["source"])
        case "resource", "noun_first":
            text = fill(
                s["article"],
                s["resource_adjective"],
                s["resource_noun"],
                "of {data}",
                s["resource_verb"],
                task,
            )
        case "resource", "data_first":
            text = fill(
                "{data} as",
                s["article"],
                s["resource_adjective"],
                s["resource_noun"],
                s["resource_verb"],
                task,
            )
        case "resource", "colon":
            text = fill(
                "{data}",
                s["resource_verb"],
                task,
                sep,
                s["article"],
                s["resource_adjective"],
                s["resource_noun"],
            )
        case "system", "noun_first":
            text = fill(
                s["article"],
                s["adjective"],
                s["system_noun"],
                s["system_verb"],
                task,
                s["audience"],
            )
        case "system", "verb_first":
            text = fill(
                s["system_verb"],
                task,
                s["instrument"],
                "{method}",
                s["audience"],
                sep,
                s["article"],
                s["system_noun"],
            )
        case "system", "colon":
            text = fill(
                task,
                s["tail"],
                sep,
                s["article"],
                s["adjective"],
                s["system_noun"],
                s["instrument"],
                "{method}",
            )
    if s["casing"] == "title":
        text = text.title()
    elif s["casing"] == "sentence":
        text = text[0].upper() + text[1:]
    return text.replace(f" {sep} ", s["separator"]).replace(" ?", "?")


def abstract(rng: random.Random, content: dict[str, str]) -> str:
    sentences = (OPENINGS, PROBLEMS, BODIES[content["kind"]], CLOSINGS)
    return " ".join(rng.choice(variants).format(**content) for variants in sentences)


def style_of(rng: random.Random) -> dict[str, str]:
    return {factor: rng.choice(options) for factor, options in STYLE.items()}


def user_rng(seed: int, split: str, number: int | str) -> random.Random:
    """The generator that draws a user, their style first."""
    return random.Random(f"{seed}/{split}/{int(number)}")


def notes(seed: int, split: str, number: int | str) -> list[str]:
    """The user's style in words, which no example shows; the bundled LLM was pretrained on such."""
    said = []
    for factor, option in style_of(user_rng(seed, split, number)).items():
        words = re.sub(r"\{\w+\}", "", option).replace("_", " ").split()
        if words:
            kind, frame, _ = factor.partition("_frame")
            said.append(" ".join([kind, *words] if frame else words))
    return said


def user(seed: int, number: int, split: str, history: tuple[int, int]) -> Example:
    """User `number` of `split`: a question, its gold title, and a profile of `history` papers."""
    rng = user_rng(seed, split, number)
    style = style_of(rng)
    # A user comes back to the same few subjects, so that retrieval has something to find.
    tasks, methods, data = rng.sample(TASKS, 6), rng.sample(METHODS, 6), rng.sample(DATA, 4)
    papers = []
    seen = set()
    wanted = rng.randint(*history) + 1
    while len(papers) < wanted:
        content = {
            "kind": rng.choice(tuple(BODIES)),
            "task": rng.choice(tasks),
            "method": rng.choice(methods),
            "data": rng.choice(data),
            "trouble": rng.choice(TROUBLES),
            "quality": rng.choice(QUALITIES),
        }
        content["Task"] = content["task"].capitalize()
        paper = {"title": title(style, content), "abstract": abstract(rng, content)}
        if paper["title"] not in seen:
            seen.add(paper["title"])
            papers.append(paper)
    question = papers.pop()
    id = f"{number:06d}"
    profile = tuple({"id": f"{id}-{i}"} | paper for i, paper in enumerate(papers))
    return Example(id, INPUT.format(abstract=question["abstract"]), question["title"], profile)


def users(
    seed: int, split: str, count: int | None = None, history: tuple[int, int] = (8, 16)
) -> Iterator[Example]:
    """The first `count` users of `split`; without `count`, without end."""
    for number in itertools.count() if count is None else range(count):
        yield user(seed, number, split, history)
