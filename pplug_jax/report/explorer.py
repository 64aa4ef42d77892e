"""Collect what the page's script needs to show single users: texts, scores, weights, the map."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pplug_jax.data.lamp import Example, Item
from pplug_jax.report.runs import Run, Split
from pplug_jax.report.scores import Statistics
from pplug_jax.scoring.metrics import METRICS
from pplug_jax.scoring.style import distances

MAX_ITEMS = 40  # of a history: the heaviest, or without weights the newest, and what prompts have
MAX_ITEM_TEXT = 300  # characters
MAX_TEXT = 1200  # of an input, a gold or an output


def principal_plane(personas: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Return the two directions of most variance (PCA): coordinates (n, 2) and the directions'
    shares.

    An axis points where its largest coordinate is positive.

    Args:
        personas: (n, D) float.
    """
    centred = personas.astype(np.float64) - personas.mean(axis=0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(personas), 2))
    points[:, : min(2, len(s))] = (u * s)[:, :2]
    furthest = points[np.abs(points).argmax(axis=0), [0, 1]]
    shares = s**2 / max(np.sum(s**2), np.finfo(float).tiny)
    return points * np.where(furthest < 0, -1, 1), [*shares.tolist(), 0.0][:2]


def explorer(
    run: Run,
    split: Split,
    answers: Mapping[str, Sequence[str]],
    statistics: Mapping[str, Statistics],
    personas: Mapping[str, Mapping[str, np.ndarray]],
    prompts: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, Any]:
    """Return the users shown, and for each method that left personas their map."""
    shown = list(split.shown)
    scores = {
        name: {
            metric: METRICS[metric].value(rows[shown])
            for metric, rows in of.items()
            if metric != "macro_f1"  # says nothing of one example
        }
        for name, of in statistics.items()
    }
    if "style" in run.metrics:
        # In deviations of what the shown users wrote, which are all of a split of no great size.
        theirs = list(split.shown.values())
        for name, of in scores.items():
            style = distances(run.task, theirs, [answers[name][i] for i in shown])
            of["style"] = METRICS["style"].value(style)
    scored = list(next(iter(scores.values()), {}))
    ends = np.cumsum(split.lengths)
    examples = []
    for place, (i, example) in enumerate(split.shown.items()):
        rows = slice(ends[i] - split.lengths[i], ends[i])
        weights = {
            name: {
                "own": arrays["weights"][rows],
                "other": arrays["other"][rows] if arrays["other_item"][i] >= 0 else None,
                "item": int(arrays["other_item"][i]),
            }
            for name, arrays in personas.items()
        }
        outputs = {name: _cut(texts[i], MAX_TEXT) for name, texts in answers.items()}
        of_methods = {
            name: _rounded(np.array([values[place] for values in of.values()]))
            for name, of in scores.items()
        }
        in_prompt = {name: places[i] for name, places in prompts.items()}
        examples.append(
            _texts(run, example, weights, in_prompt) | {"outputs": outputs, "scores": of_methods}
        )
    maps = {}
    for name, arrays in personas.items():
        points, shares = principal_plane(arrays["persona"][shown])
        maps[name] = {"points": [_rounded(point) for point in points], "shares": shares}
        if name != "none" and {name, "none"} <= scores.keys():
            gain = scores[name][scored[0]] - scores["none"][scored[0]]
            better = -1 if METRICS[scored[0]].lower_is_better else 1
            maps[name]["gain"] = _rounded(better * gain)
    return {
        "examples": examples,
        "scored": scored,
        "maps": maps,
        "classes": bool(run.task.labels) and None not in split.golds,
    }


def _texts(
    run: Run,
    example: Example,
    weights: Mapping[str, Mapping[str, Any]],
    prompts: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Return an example's texts, and of the items shown the weights and whose prompts have them."""
    items = run.history(example)
    known = [of for w in weights.values() for of in (w["own"], w["other"]) if of is not None]
    others = [w["item"] for w in weights.values()]
    places = _shown_items(len(items), known, others, itertools.chain(*prompts.values()))
    return {
        "id": example.id,
        "user": example.user,
        "length": len(items),
        "input": _cut(example.input, MAX_TEXT),
        "gold": None if example.target is None else _cut(example.target, MAX_TEXT),
        "items": [
            _item(run, items[place])
            | {
                "place": place,
                "prompts": [name for name, chosen in prompts.items() if place in chosen],
            }
            for place in places
        ],
        "weights": {
            name: {
                "own": _rounded(w["own"][places]),
                "other": None if w["other"] is None else _rounded(w["other"][places]),
                "item": w["item"],
            }
            for name, w in weights.items()
        },
    }


def _item(run: Run, item: Item) -> dict[str, str]:
    """Return an item's text, cut in front of an answer that ends it, and the answer."""
    text = run.task.item_text(item, run.config.data.history_labels)
    answer = (item.get(run.task.answer) or "").strip()
    before = text.removesuffix(answer)
    cut = _cut(before, MAX_ITEM_TEXT)
    end = text[len(before) :]
    return {"text": f"{cut} {end}" if end and cut != before else cut + end, "answer": answer}


def _shown_items(
    length: int, weights: Sequence[np.ndarray], others: Iterable[int], prompted: Iterable[int]
) -> list[int]:
    """Return the places of the items that the page shows of a history of `length`.

    They are `others`, half of the room for the heaviest, and then what prompts have.
    """
    if length <= MAX_ITEMS:
        return list(range(length))
    importance = np.max(weights, axis=0) if len(weights) else np.arange(length)
    ranked = np.argsort(-importance, kind="stable").tolist()
    first = [other for other in others if other >= 0]
    wanted = [*first, *ranked[: MAX_ITEMS // 2], *prompted, *ranked]
    return sorted(list(dict.fromkeys(wanted))[:MAX_ITEMS])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _rounded(values: np.ndarray) -> list[float]:
    """Round values to four digits: a page can show no more."""
    return [float(f"{value:.4g}") for value in values.tolist()]
