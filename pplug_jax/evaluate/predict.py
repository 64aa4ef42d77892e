"""Answer the held-out examples with a method, and record what the plug made of each user."""

import contextlib
import functools
import json
import math
import operator
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pplug_jax.data import submission
from pplug_jax.data.lamp import Example
from pplug_jax.feed.batches import Batch, Tokenized, place_batch, plan_batches, with_queries
from pplug_jax.llm import LLM
from pplug_jax.llm.prompts import Behind
from pplug_jax.methods.shown import Layout, layout_of, shown
from pplug_jax.methods.table import Method, methods_of
from pplug_jax.methods.users import own_items
from pplug_jax.plugs.base import parameter_count
from pplug_jax.plugs.forward import Weights, answer_tokens, gold_losses
from pplug_jax.plugs.lora import Lora
from pplug_jax.plugs.lora_persona import LoraPersona
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.plugs.reading import Reading
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.ahead import compiled_ahead
from pplug_jax.runtime.console import Progress
from pplug_jax.runtime.distributed import fetch, wait_for_all
from pplug_jax.runtime.mesh import parts
from pplug_jax.runtime.primary import is_primary
from pplug_jax.session import Models
from pplug_jax.session.inputs import assembler, place_of, tokenize
from pplug_jax.session.weights import abstract_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.checkpoint import Checkpoints
from pplug_jax.storage.files import read_text, write_json
from pplug_jax.storage.workdir import (
    about_path,
    checkpoints_path,
    judged_path,
    personas_path,
    predictions_path,
)
from pplug_jax.train.user_lora import UserLoras


class Answers(NamedTuple):
    """A method's answers and what they cost.

    Attributes:
        texts: {example's id: answer}.
        losses: for each example's gold, the sum over its tokens and their number.
        step: the trained weights' step, if any.
        trainable: the number of parameters that training changed.
        bytes_per_user: the bytes that must be kept of a user, on average.
        prompt_tokens: the tokens that the LLM reads before an answer, on average.
        milliseconds: an example's time, the median over batches.
        shown: for each example the places in its profile of the items that the prompt shows, if
            they are the user's own.
    """

    texts: dict[str, str]
    losses: list[tuple[float, float]]
    step: int | None
    trainable: int
    bytes_per_user: float
    prompt_tokens: float
    milliseconds: float
    shown: Sequence[Sequence[int]] = ()


class Shared:
    """The same weights for every user, as `UserLoras` are one's own.

    Attributes:
        shapes: the LLM's shapes, to compile for.
        llm: the LLM.
        order: the order in which the examples are answered.
    """

    def __init__(self, models: Models, weights: Weights | None, examples: int):
        self.weights, self.models = weights, models
        self.shapes, self.order = models.abstract_llm, np.arange(examples)

    @property
    def llm(self) -> LLM:
        return self.models.llm

    def of(self, indices: Sequence[int]) -> Weights | None:
        """Return the weights for a batch of these examples."""
        return self.weights


def predict(
    models: Models,
    method: Method,
    config: Settings,
    weights: Weights | None,
    tokenized: Sequence[Tokenized],
    user_items: Sequence[Sequence[Tokenized]] = (),
) -> tuple[list[str], np.ndarray, float]:
    """Return the method's answer to each example, its gold's losses, and an example's milliseconds.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config (`table.configured`).
        weights: the trained weights, if any.
        tokenized: the examples, as the method shows them.
        user_items: each user's history items as examples, for a method with `user_lora`.

    Returns:
        answers; losses (n, 2), as in `Answers.losses`; milliseconds.
    """
    tokenizer, size = models.tokenizer, config.eval.batch_size
    assemble = assembler(models, method, config, tokenized, size)
    answers, losses, times = [""] * len(tokenized), np.zeros((len(tokenized), 2)), []
    trained = (
        UserLoras(models, config, weights, user_items)
        if method.user_lora and isinstance(weights, Lora)
        else Shared(models, weights, len(tokenized))
    )
    order, users_of_one = trained.order, 1
    if layout_of(method, config).behind:
        order, users_of_one = by_prompt(tokenized, size // parts(models.mesh, "batch"))
    groups = order.reshape(-1, users_of_one)
    planned = plan_batches(
        np.arange(len(groups)), assemble.buckets.of[groups[:, 0]], size // users_of_one
    )
    batches = [(bucket, groups[rows].ravel()) for bucket, rows in planned]
    reading = {"place": place_of(models, method, config), "reading": method.reading}
    static = {answer_tokens: reading | config.eval.decoding, gold_losses: reading}
    untrained = trained.of([]), trained.shapes

    def lower(program: tuple[Any, int]) -> jax.stages.Lowered:
        function, bucket = program
        empty = assemble((0, bucket, np.zeros(0, int))).with_prompts_of(users_of_one)
        with jax.set_mesh(models.mesh):
            batch = place_batch(empty, models.mesh)
            return function.lower(*untrained, batch, **static[function])

    buckets = dict.fromkeys(bucket for bucket, _ in batches)
    programs = [(function, bucket) for bucket in buckets for function in static]
    with (
        compiled_ahead(lower, programs) as compiled,
        Progress(f"answering with {method.name}", len(tokenized), "examples") as progress,
    ):
        llm = trained.llm  # loaded while the programs compile
        for bucket, indices in batches:
            answer_with = compiled((answer_tokens, bucket))
            start = time.monotonic()
            arguments = trained.of(indices), llm
            batch = assemble((0, bucket, indices)).with_prompts_of(users_of_one)
            batch = place_batch(batch, models.mesh)
            tokens = answer_with(*arguments, batch)
            for index, row in zip(indices, fetch(tokens), strict=False):
                answers[index] = tokenizer.decode(row)
            times.append(1000 * (time.monotonic() - start) / len(indices))
            sums = compiled((gold_losses, bucket))(*arguments, batch)
            losses[indices] = fetch(sums)[: len(indices)]
            progress.advance(len(indices))
    return answers, losses, float(np.median(times))


def by_prompt(tokenized: Sequence[Tokenized], most: int) -> tuple[np.ndarray, int]:
    """Order examples by prompt, so that several users in a row share one.

    Args:
        tokenized: the examples.
        most: the largest number of users that may share.

    Returns:
        the order, and how many consecutive users share a prompt everywhere in it. The number
            divides `most`; it is 1, and the order unchanged, unless every prompt occurs several
            times.
    """
    order = sorted(range(len(tokenized)), key=lambda i: tokenized[i].prompt.tobytes())
    numbers = Counter(example.prompt.tobytes() for example in tokenized).values()
    users = math.gcd(most, *numbers)
    return (np.array(order) if users > 1 else np.arange(len(order))), users


def answer_examples(
    models: Models,
    method: Method,
    config: Settings,
    examples: Sequence[Example],
    tokenized: Callable[[Layout], Sequence[Tokenized]],
    directory: Path,
    weights: Callable[[], Weights],
) -> Answers:
    """Run a method on the held-out examples, unless the same weights' answers are on disk.

    Writes predictions/ and, for a plug that reads the user, personas/ in `directory`.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config (`table.configured`).
        examples: the held-out examples.
        tokenized: tokenises the examples; called only if needed.
        directory: holds the method's checkpoints and receives the answers.
        weights: restores the method's trained weights; called only if needed.
    """
    task, split = models.task, config.data.eval_split
    path = predictions_path(directory, split, method.name)
    about = about_path(path)
    step = None
    if method.plug:
        trained_path = checkpoints_path(directory, method.plug)
        with contextlib.closing(Checkpoints(trained_path)) as checkpoints:
            step = checkpoints.best
    if path.is_file() and about.is_file():
        facts = json.loads(read_text(about))
        known = submission.read(path, task)
        current = facts.keys() | {"texts"} == set(Answers._fields)
        if (
            current
            and facts["step"] == step
            and list(known) == [example.id for example in examples]
        ):
            return Answers(known, **facts)
    trained, trainable = None, 0
    if method.plug:
        trained = weights()
        trainable = trained.trained(methods_of(models.config)[method.plug].reading)
    start = time.monotonic()
    show = functools.partial(shown, models.task, models.tokenizer, models.store, method, config)
    inputs = show(examples, tokenized(layout_of(method, config)))
    preparing = 1000 * (time.monotonic() - start) / len(inputs) if method.retrieval else 0.0
    user_items = []
    if method.user_lora:
        layout = layout_of(method, config)
        newest = config.data.max_history
        user_items = [
            show((), tokenize(models, own_items(task, example, newest), layout))
            for example in examples
        ]
    texts, losses, milliseconds = predict(models, method, config, trained, inputs, user_items)
    answers = Answers(
        {example.id: text for example, text in zip(examples, texts, strict=True)},
        losses.tolist(),
        step,
        trainable,
        _bytes_per_user(models, method, config, examples, inputs),
        prompt_tokens(models, method, config, inputs),
        preparing + milliseconds,
        [] if method.history == "another" else [list(each.shown) for each in inputs],
    )
    submission.write(path, task, answers.texts)
    if task.judged:
        submission.write_judged(judged_path(path), task, examples, answers.texts)
    plug = trained.persona if isinstance(trained, LoraPersona) else trained
    if isinstance(plug, UserEmbedder) and method.history == "own":
        write_personas(models, method, config, plug, examples, inputs, directory)
    write_json(about, {k: v for k, v in answers._asdict().items() if k != "texts"})
    wait_for_all(f"answers of {method.name}")
    return answers


def prompt_tokens(
    models: Models, method: Method, config: Settings, tokenized: Sequence[Tokenized]
) -> float:
    """Return the mean number of tokens that the LLM reads before an answer, soft ones included.

    Args:
        models: the run's models.
        method: the method.
        config: the method's config (`table.configured`).
        tokenized: the examples, as the method shows them.
    """
    place = place_of(models, method, config)
    added = len(place.suffix) if isinstance(place, Behind) else 0
    if method.plug:
        added += PLUGS[method.kind].soft_tokens(config, method.reading)
    return added + statistics.mean(len(arrays.prompt) for arrays in tokenized)


def _bytes_per_user(
    models: Models,
    method: Method,
    config: Settings,
    examples: Iterable[Example],
    inputs: Sequence[Tokenized],
) -> float:
    """Return a user's mean bytes: texts as UTF-8, vectors and LoRAs as float16."""
    total = 0.0
    if method.retrieval:
        text_of: Callable[[Any], str] = models.item_text
        if method.answers:
            text_of = operator.itemgetter(models.task.answer)
        texts = [map(text_of, example.profile) for example in examples]
        total += statistics.mean(sum(len(text.encode()) for text in items) for items in texts)
    vectors = 0.0
    if method.retrieval == "dense":
        most = config.data.max_history
        vectors = statistics.mean(min(len(example.profile), most) for example in examples)
    elif method.plug and PLUGS[method.kind].reads_input:
        vectors = statistics.mean(len(arrays.history.texts) for arrays in inputs)
    total += vectors * models.encoder.size * 2
    if method.user_lora:
        weights: Any = abstract_weights(models, method, config)
        total += parameter_count(weights) * 2
    return total


@functools.partial(jax.jit, static_argnames="reading")
def _personas(plug: UserEmbedder, batch: Batch, reading: Reading) -> tuple[jax.Array, jax.Array]:
    soft = plug(batch.plug_inputs, reading=reading)
    return plug.attention(batch.plug_inputs, reading=reading), jnp.mean(
        soft[:, reading.instruction :], axis=1
    )


def write_personas(
    models: Models,
    method: Method,
    config: Settings,
    plug: UserEmbedder,
    examples: Iterable[Example],
    inputs: Sequence[Tokenized],
    directory: Path,
) -> None:
    """Write an npz of what the plug made of each user, for people to look at.

    `lengths` (n,) has the items of each history. `weights` and `other`, (sum of lengths,) float32,
    are the items' attention weights for the example's input, and for the text of the user's newest
    item as an input. `other_item` (n,) is that item's place, -1 for none. `persona` (n, D) float32
    is the mean of the persona tokens.
    """
    texts = [
        example.profile[-1][models.task.cut] if len(arrays.history.texts) else ""
        for example, arrays in zip(examples, inputs, strict=True)
    ]
    if layout_of(method, config).encoded:
        others = with_queries(inputs, texts, models.queries)
    else:
        queries = models.encoder.queries(texts)
        others = [
            arrays._replace(query=np.array(query, np.int32))
            for arrays, query in zip(inputs, queries, strict=True)
        ]
    results = []
    for tokenized in (inputs, others):
        assemble = assembler(models, method, config, tokenized, config.eval.batch_size)
        weights = [np.zeros(0)] * len(tokenized)
        personas = np.zeros((len(tokenized), models.abstract_llm.config.hidden_size), np.float32)
        for bucket, indices in plan_batches(
            np.arange(len(tokenized)), assemble.buckets.of, config.eval.batch_size
        ):
            with jax.set_mesh(models.mesh):
                batch = place_batch(assemble((0, bucket, indices)), models.mesh)
                items, persona = _personas(plug, batch, method.reading)
            for i, row in zip(indices, fetch(items), strict=False):
                weights[i] = row[: len(tokenized[i].history.texts)]
            personas[indices] = fetch(persona)[: len(indices)]
        results.append((np.concatenate(weights), personas))
    if not is_primary():
        return
    lengths = np.array([len(arrays.history.texts) for arrays in inputs])
    path = personas_path(directory, config.data.eval_split, method.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(
            file,
            lengths=lengths,
            weights=results[0][0],
            other=results[1][0],
            other_item=lengths - 1,
            persona=results[0][1],
        )
