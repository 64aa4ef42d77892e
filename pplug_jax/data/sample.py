"""The embedded sample: LaMP-5-shaped users, made up from word lists by a seed.

Every paper is of a kind (method, study, resource, system), has a few content words and stresses one
aspect (trouble, data, quality). Its abstract tells these in plain sentences that are drawn without
regard to the user. Its title tells them in the user's own style: one option of each of `STYLE`'s
factors, used wherever the paper's kind and aspect allow it. The factors of `BY_KIND` a user chooses
anew for every kind of paper, the others once. So one input never reveals the style, a title reveals
a part, and a history nearly all of it, if the right items are looked at: papers of another kind may
tell the wrong option. With more than 10^10 combinations users unseen in training are new
combinations.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator

from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS

STYLE: dict[str, tuple[str, ...]] = {
    # wording
    "opener": ("rethinking", "learning", "revisiting", "understanding"),
    "adjective": ("robust", "simple", "frugal", "honest"),
    "article": ("the", "one", "our"),
    "noun": ("approach", "framework", "recipe"),
    "instrument": ("with", "via", "through"),
    "purpose": ("for", "towards", "behind"),
    "tail": ("at scale", "in practice", "made easy"),
    "study_noun": ("audit", "survey", "trial"),
    "study_verb": ("shape", "help", "limit"),
    "resource_noun": ("corpus", "benchmark", "archive"),
    "resource_adjective": ("open", "large", "curated"),
    "resource_verb": ("to study", "to teach", "to compare"),
    "system_noun": ("toolkit", "platform", "engine"),
    "system_verb": ("running", "automating", "supporting"),
    "audience": ("for analysts", "for everyone", "for teams"),
    "trouble_phrase": ("under {trouble}", "despite {trouble}", "facing {trouble}"),
    "data_phrase": ("from {data}", "on {data}", "across {data}"),
    "quality_phrase": ("gaining {quality}", "minding {quality}", "seeking {quality}"),
    # structure
    "method_frame": ("opened", "inverted"),
    "study_frame": ("asking", "noting"),
    "resource_frame": ("leading", "trailing"),
    "system_frame": ("acting", "closing"),
    "aspect_place": ("ahead", "after"),
    # look, which ROUGE does not see
    "separator": (": ", " - "),
    "casing": ("sentence", "lower"),
}

# What a user does in one way in papers of one kind, and perhaps in another in those of the next.
BY_KIND = (
    "opener", "adjective", "article", "instrument", "purpose", "tail",
    "aspect_place", "separator", "casing",
)  # fmt: skip

# The title without its aspect, by the paper's kind and the user's frame for it.
FRAMES = {
    "method": {
        "opened": "{opener} {task} {instrument} {adjective} {method}",
        "inverted": "{article} {method} {noun} {purpose} {task} {tail}",
    },
    "study": {
        "asking": "do {method} {study_verb} {task}? {article} {study_noun}",
        "noting": "{opener} {method} {purpose} {task}{separator}{study_noun}",
    },
    "resource": {
        "leading": "{article} {resource_adjective} {resource_noun} {resource_verb} {task}",
        "trailing": "{resource_verb} {task}{separator}{resource_adjective} {resource_noun}",
    },
    "system": {
        "acting": "{system_verb} {task} {instrument} {method} {audience}",
        "closing": "{task} {tail}{separator}{article} {adjective} {system_noun} {audience}",
    },
}
PLACES = {"ahead": "{aspect}{separator}{core}", "after": "{core} {aspect}"}

PROBLEMS = (
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
ASPECTS = {
    "trouble": (
        "label noise", "missing values", "tight budgets", "sudden drift", "rare classes",
        "slow sensors", "weak supervision", "long delays",
    ),
    "data": (
        "court records", "tide tables", "museum catalogues", "bus logs", "patient notes",
        "weather charts", "bird calls", "tax forms", "school essays", "power meters",
        "harbour photos", "chess games", "soil samples", "radio shows", "parish books",
        "recipe cards",
    ),
    "quality": ("accuracy", "coverage", "speed", "fairness", "stability", "recall"),
}  # fmt: skip

# Sentences of an abstract. They are the same for all kinds and aspects but for the deed and the
# term, so that papers alike in words need not be alike in what their titles show.
OPENINGS = (
    "Many people depend on {task}.",
    "The demand for {task} grows.",
    "Work on {task} has a long history.",
    "Much has been said about {task}.",
)
BODIES = (
    "In this paper we {deed} {method}.",
    "Here we {deed} {method}.",
    "We {deed} {method} and discuss the outcome.",
)
CLOSINGS = ("The focus is on {term}.", "What matters most is {term}.", "All of it is about {term}.")
DEEDS = {
    "method": ("propose", "develop", "design"),
    "study": ("examine", "compare", "question"),
    "resource": ("annotate texts for", "gather examples for", "publish data for"),
    "system": ("deploy", "operate", "install"),
}


def title(style: dict[str, str], content: dict[str, str]) -> str:
    """Return the title that a user of `style` gives to a paper of `content`."""
    kind, aspect = content["kind"], content["aspect"]
    core = FRAMES[kind][style[f"{kind}_frame"]]
    text = PLACES[style["aspect_place"]].format(
        core=core, aspect=style[f"{aspect}_phrase"], separator=style["separator"]
    )
    text = text.format(**style, **content)
    return text[0].upper() + text[1:] if style["casing"] == "sentence" else text


def abstract(rng: random.Random, content: dict[str, str]) -> str:
    deed, term = rng.choice(DEEDS[content["kind"]]), content[content["aspect"]]
    return " ".join(
        rng.choice(variants).format(**content, deed=deed, term=term)
        for variants in (OPENINGS, BODIES, CLOSINGS)
    )


def kind_of(abstract: str) -> str:
    """Return the kind of an abstract's paper, which its deed tells."""
    kinds = {deed.split()[0]: kind for kind, deeds in DEEDS.items() for deed in deeds}
    return next(kinds[verb] for verb in re.findall(r"\b[Ww]e (\w+)", abstract) if verb in kinds)


def style_of(rng: random.Random, factors: Iterable[str] = tuple(STYLE)) -> dict[str, str]:
    return {factor: rng.choice(STYLE[factor]) for factor in factors}


def user_rng(seed: int, split: str, number: int | str) -> random.Random:
    """Return the generator that draws a user, their style first."""
    return random.Random(f"{seed}/{split}/{int(number)}")


def styles_of(seed: int, split: str, number: int | str) -> dict[str, dict[str, str]]:
    """Return the user's style for every kind of paper."""
    style = style_of(user_rng(seed, split, number))
    rng = user_rng(seed, f"{split}/kinds", number)
    return {kind: style | style_of(rng, BY_KIND) for kind in FRAMES}


def notes(seed: int, split: str, number: int | str) -> list[str]:
    """Return the style of a user of `one_style` in words, from which the bundled LLM learnt."""
    words = {": ": "colon", " - ": "dash"}
    return [
        words.get(option) or re.sub(r" *\{\w+\}", "", option)
        for option in style_of(user_rng(seed, split, number)).values()
    ]


def user(
    seed: int, number: int, split: str, history: tuple[int, int], one_style: bool = False
) -> Example:
    """Make user `number` of `split`: a question, its gold title, a profile of `history` papers.

    With `one_style` the user writes about every kind of paper in the same style.
    """
    rng = user_rng(seed, split, number)
    style = style_of(rng)
    styles = dict.fromkeys(FRAMES, style) if one_style else styles_of(seed, split, number)
    # A user comes back to the same few subjects, so that retrieval has something to find.
    tasks, methods = rng.sample(PROBLEMS, 6), rng.sample(METHODS, 6)
    papers: dict[str, str] = {}
    wanted = rng.randint(*history) + 1
    while len(papers) < wanted:
        aspect = rng.choice(tuple(ASPECTS))
        content = {
            "kind": rng.choice(tuple(FRAMES)),
            "aspect": aspect,
            "task": rng.choice(tasks),
            "method": rng.choice(methods),
            aspect: rng.choice(ASPECTS[aspect]),
        }
        papers.setdefault(title(styles[content["kind"]], content), abstract(rng, content))
    target = list(papers)[-1]
    input = TASKS["LaMP_5"].question.format(abstract=papers.pop(target))
    id = f"{number:06d}"
    profile = tuple(
        {"id": f"{id}-{i}", "title": text, "abstract": papers[text]}
        for i, text in enumerate(papers)
    )
    return Example(id, input, target, profile)


def users(
    seed: int,
    split: str,
    count: int | None = None,
    history: tuple[int, int] = (8, 16),
    one_style: bool = False,
) -> Iterator[Example]:
    """Yield the first `count` users of `split`, or without `count` users without end."""
    for number in itertools.count() if count is None else range(count):
        yield user(seed, number, split, history, one_style)
