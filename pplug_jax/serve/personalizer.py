"""Serve a trained plug: from a history and an input to a personal answer of the frozen LLM."""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from pplug_jax.data.keys import text_keys
from pplug_jax.data.lamp import Item, check_history, check_input
from pplug_jax.encoder.bert import Bert
from pplug_jax.errors import InputError
from pplug_jax.feed.batches import PlugInputs, round_up
from pplug_jax.feed.features import compare_with_peers, of_history, of_items
from pplug_jax.feed.retrieval import nearest
from pplug_jax.llm import LLM
from pplug_jax.methods.shown import in_words, layout_of, top_k
from pplug_jax.methods.table import Method, configured
from pplug_jax.plugs.base import Plug
from pplug_jax.plugs.forward import continuation
from pplug_jax.plugs.lora_persona import LoraPersona, persona_of
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.plugs.reading import Reading, features_of
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.runtime.console import say
from pplug_jax.serve.handover import (
    CARD,
    PLUG_CONFIG,
    SERVED,
    WEIGHTS,
    read_plug,
    served,
    upload,
    write_plug,
)
from pplug_jax.session import Models
from pplug_jax.session.weights import restore_weights
from pplug_jax.settings import Settings, upgraded
from pplug_jax.storage.files import read_object
from pplug_jax.storage.workdir import CONFIG, checkpoints_path, run_path, seed_path

History = Sequence[str | dict[str, Any]]
GROUPS = (16, 4, 1)  # inputs that are encoded together: few numbers, for each is compiled


@functools.partial(jax.jit, static_argnames="reading")
def _soft_prompts(plug: UserEmbedder, inputs: PlugInputs, reading: Reading) -> jax.Array:
    return plug(inputs, reading=reading)


@functools.partial(jax.jit, static_argnames="reading")
def _soft_and_weights(
    plug: UserEmbedder, inputs: PlugInputs, reading: Reading
) -> tuple[jax.Array, jax.Array]:
    return plug(inputs, reading=reading), plug.attention(inputs, reading=reading)


@jax.jit
def _embed(llm: LLM, tokens: jax.Array) -> jax.Array:
    return llm.embed(tokens)


_answers = jax.jit(
    continuation, static_argnames=("place", "max_new_tokens", "num_beams", "length_penalty")
)


def padded_length(length: int) -> int:
    """Return the next of the few lengths that programs are compiled for: 16, 32, 64, 128, .."""
    return 1 << (round_up(length) - 1).bit_length()


def pad(array: np.ndarray, *lengths: int) -> np.ndarray:
    """Append zeros to the first axes, up to these lengths."""
    widths = [(0, n - have) for n, have in zip(lengths, array.shape, strict=False)]
    return np.pad(array, [*widths, *[(0, 0)] * (array.ndim - len(lengths))])


def row(ids: Sequence[int] | np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens as a batch of one padded row, (1, length) int32, and its mask."""
    return pad(np.asarray(ids, np.int32), length)[None], (np.arange(length) < len(ids))[None]


class Personal(NamedTuple):
    """What a plug makes of a user for one input.

    Attributes:
        prompt: the input, with what the plug's method shows of the user in words.
        soft: (k + 1, D) float32, the soft tokens.
        weights: (n,) float32, how much each of the newest items weighed; they add up to 1, or to 0
            if the plug reads none.
    """

    prompt: str
    soft: np.ndarray
    weights: np.ndarray


class _Person(NamedTuple):
    """A user's newest items, as the plug reads them.

    Attributes:
        items: the items, or texts alone.
        vectors: (n, E) float32.
        features: of the items, (n, ..) float32, by name.
    """

    items: Sequence[str | Item]
    vectors: np.ndarray
    features: dict[str, np.ndarray]


def _read_run(workdir: epath.PathLike, name: str | None) -> tuple[Models, Plug, Method]:
    """Load a run's models and the trained plug of one of its methods."""
    workdir = epath.Path(workdir)
    run = run_path(workdir)
    path = run / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file; {workdir} is not the workdir of a run")
    config = Settings.of(upgraded(read_object(path)))
    # The config's methods first; others may have been trained here since.
    known = [name for name in dict.fromkeys([*config.methods, *SERVED]) if name in SERVED]
    trained = [name for name in known if _any_in(checkpoints_path(workdir, name))]
    method = served(name or next(iter(trained), "pplug"))
    if method.name not in trained:
        seeds = [path for seed in config.seeds if (path := seed_path(workdir, seed)).is_dir()]
        advice = f"take {' or '.join(trained or map(str, seeds))}, or " if trained or seeds else ""
        raise InputError(
            f"{workdir}: {method.name!r} was not trained here (config.methods: "
            f"{', '.join(config.methods)}); {advice}train it"
        )
    seed = config.seed if run == workdir else int(workdir.name.removeprefix("seed_"))
    config = configured(config, method, seed)
    models = Models(config, run)
    return models, restore_weights(models, method, config, workdir), method


def _any_in(directory: epath.Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def export(workdir: epath.PathLike, output: Path, method: str | None = None) -> None:
    """Write a plug of the run in `workdir` to `output`, for `Personalizer.from_pretrained`.

    Args:
        workdir: the run's; of a comparison `seed_0` in it, or another seed's.
        output: a directory.
        method: the plug's, of `handover.SERVED`; None is the first one that the run has.

    Raises:
        InputError: `workdir` has no such trained plug, or `output` cannot be written.
    """
    write_plug(*_read_run(workdir, method), output)
    size = (output / WEIGHTS).stat().st_size
    say(f"{output}: the plug ({WEIGHTS}, {size / 1e6:.1f} MB), {PLUG_CONFIG} and a model card")
    say(f"look at {output / CARD}; `hf upload ORG/NAME {output}` puts it on the hub")


class Personalizer:
    """A trained plug and its LLM, which answer for any user, even a new one, by the history alone.

    Lengths are padded to a few sizes, so that soon no request compiles anything.

    Args:
        models: the run's models. Their config is the method's (`methods.table.configured`).
        plug: the trained plug.
        method: the plug's method.
    """

    def __init__(self, models: Models, plug: Plug, method: Method = SERVED["pplug"]):
        self.models, self.plug, self.method = models, plug, method
        self.persona = persona_of(plug)
        self.features = features_of(models.config.plug)
        self.peers = models.peers if compare_with_peers(self.features) else None
        self.layout = layout_of(method, models.config)

    @classmethod
    def from_checkpoint(
        cls, workdir: epath.PathLike, *, method: str | None = None
    ) -> "Personalizer":
        """Load the run that `pplug_jax.main` left in `workdir`.

        Args:
            workdir: the run's; of a comparison `seed_0` in it, or another seed's.
            method: which of its methods answers, of `handover.SERVED`; None is the first of them.

        Raises:
            InputError: `workdir` has no run or no trained plug yet, or its models are gone.
        """
        return cls(*_read_run(workdir, method))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        llm: str | Path | None = None,
        encoder: str | Path | None = None,
    ) -> "Personalizer":
        """Load a plug that `--mode=export` or `push_to_hub` handed on.

        Args:
            path: its directory, or a hub id or URL.
            llm: the LLM that it was trained with; None is the name that the plug knows it by.
            encoder: the encoder that it was trained with; None likewise.

        Raises:
            InputError: a file is missing or bad, or the plug was trained with another LLM or
                encoder; the message names both.
        """
        return cls(*read_plug(path, llm, encoder))

    def push_to_hub(self, repository: str) -> str:
        """Put the plug and its model card, without LLM and encoder, into a repository of the hub.

        Args:
            repository: its id, org/name; it is made if it is not there.

        Returns:
            its address.

        Raises:
            InputError: the hub refuses it, or the plug cannot be handed on.
        """
        with tempfile.TemporaryDirectory() as directory:
            write_plug(self.models, self.plug, self.method, Path(directory))
            return upload(Path(directory), repository)

    @property
    def llm(self) -> LLM:
        """The LLM as the plug changes it, which answers.

        What stands in front of soft tokens behind the input is read by `models.llm`.
        """
        return self.plug.on(self.models.llm)

    @property
    def changes_llm(self) -> bool:
        """Whether the soft tokens alone are not the plug."""
        return isinstance(self.plug, LoraPersona)

    @property
    def soft_tokens(self) -> int:
        """How many soft tokens a prompt has."""
        return PLUGS[self.method.kind].soft_tokens(self.models.config, self.method.reading)

    @property
    def longest_prompt(self) -> int:
        """The most tokens that the LLM reads of a prompt, soft ones included."""
        tokenizer, config = self.models.tokenizer, self.models.config
        around = len(tokenizer.prefix) + len(tokenizer.suffix) + self.soft_tokens
        joint = len(tokenizer.ids(tokenizer.joint)) if self.layout.behind else 0
        return around + config.data.max_input_length + joint

    @property
    def own_rows(self) -> int:
        """How many rows of a prompt stand behind its input; 0 if the soft tokens do not."""
        if not self.layout.behind:
            return 0
        return self.soft_tokens + len(self.models.tokenizer.suffix)

    def soft_prompt(self, input: str, history: History = ()) -> np.ndarray:
        """Return the soft tokens [I ; P] for this input, (k + 1, D) float32.

        Each feature adds k more. The tokens belong where `config.plug.place` says.

        Args:
            input: the task's input, instruction included.
            history: profile items as the task's files have them, or the user's texts alone, which
                say nothing about the form of an answer; an empty history gives the null persona.

        Raises:
            InputError: an item lacks a field of the task or has a mistyped one; the message names
                its place.
        """
        return self.soft_prompts(input, [history])[0]

    def soft_prompts(self, input: str, histories: Sequence[History]) -> np.ndarray:
        """Return the soft tokens of each of these users for one input, (U, k + 1, D) float32.

        Args:
            input: as in `soft_prompt`.
            histories: the users' histories, each as in `soft_prompt`.

        Raises:
            InputError: as `soft_prompt`.
        """
        check_input(input)
        batches = self._soft_batches(self.encode_inputs([input])[0], histories)
        soft = [np.asarray(x, np.float32)[: len(people)] for x, people in batches]
        none = 0, self.soft_tokens, self.models.abstract_llm.config.hidden_size
        return np.concatenate([np.zeros(none, np.float32), *soft])

    def prompt(self, input: str, history: History = ()) -> str:
        """Return the input with what the plug's method shows of the user in words, if anything.

        Args:
            input: as in `soft_prompt`.
            history: as in `soft_prompt`.

        Raises:
            InputError: as `soft_prompt`.
        """
        check_input(input)
        if not self.method.retrieval:
            return input
        return self._shown(input, self.encode_inputs([input])[0], self._people([history])[0])

    def inputs_embeds(self, input: str, soft: np.ndarray) -> np.ndarray:
        """Return all that the LLM reads, the soft tokens in their place, (L, D) float32.

        Any server that takes a prompt as embeddings can go on from there, unless `changes_llm`.

        Args:
            input: as in `soft_prompt`; what `prompt` makes of it, where the method shows items.
            soft: (k + 1, D), what `soft_prompt` returns for it.
        """
        tokenizer, behind = self.models.tokenizer, self.layout.behind
        check_input(input)
        prompt = tokenizer.prompt(input, self.models.config.data.max_input_length, behind)
        before = len(prompt) if behind else len(tokenizer.prefix)
        ids = [*prompt, *(tokenizer.suffix if behind else [])]
        padded, _ = row(ids, padded_length(len(ids)))
        text = np.asarray(_embed(self.models.embedding, padded), np.float32)[0, : len(ids)]
        return np.concatenate([text[:before], soft, text[before:]])

    def generate(self, input: str, history: History = ()) -> str:
        """Return the LLM's answer to `input` for the user of `history`, decoded as in evaluation.

        Args:
            input: as in `soft_prompt`.
            history: as in `soft_prompt`.

        Raises:
            InputError: as `soft_prompt`.
        """
        return self.generate_many(input, [history])[0]

    def generate_many(self, input: str, histories: Sequence[History]) -> list[str]:
        """Return the answers to one input for each of these users, as `generate` does.

        With soft tokens behind the input, the LLM reads it once for `config.eval.batch_size` users,
        unless it shows items of theirs.

        Args:
            input: as in `soft_prompt`.
            histories: the users' histories, each as in `soft_prompt`.

        Raises:
            InputError: as `soft_prompt`.
        """
        models, config = self.models, self.models.config
        tokenizer, behind = models.tokenizer, self.layout.behind
        check_input(input)
        asked, answers = self.encode_inputs([input])[0], []
        for soft, people in self._soft_batches(asked, histories):
            # All have the same prompt if it shows no items.
            shows = people if self.method.retrieval else people[:1]
            prompts = [self._shown(input, asked, person) for person in shows]
            ids = [
                tokenizer.prompt(prompt, config.data.max_input_length, behind) for prompt in prompts
            ]
            length = padded_length(max(map(len, ids)))
            texts, masks = map(np.concatenate, zip(*(row(x, length) for x in ids), strict=True))
            # Users of one prompt read it once if it stands in front; rows fill up as `soft`'s do.
            rows = 1 if behind and len(ids) == 1 else len(soft)
            of_row = np.arange(rows) % len(ids)
            tokens = _answers(
                models.llm,
                self.llm,
                soft,
                texts[of_row],
                masks[of_row],
                place=tokenizer.place(behind),
                **config.eval.decoding,
            )
            answers += [tokenizer.decode(row) for row in np.asarray(tokens)[: len(people)]]
        return answers

    def personal(
        self, input: str, asked: np.ndarray, history: Sequence[str | Item], vectors: np.ndarray
    ) -> Personal:
        """Return what the plug makes of one user whose vectors are known.

        Args:
            input: as in `soft_prompt`.
            asked: (1 or 2, E), the input's vectors, as `encode_inputs` makes them.
            history: the user's newest items, at most `config.data.max_history`, in order.
            vectors: (n, E), the items' vectors, as `encode_items` makes them.

        Raises:
            InputError: an item lacks a field of the task or has a mistyped one.
        """
        person = self._person(*self._read(history, by_date=False), vectors.astype(np.float32))
        inputs = self._inputs(asked, [person])
        soft, weights = _soft_and_weights(self.persona, inputs, self.method.reading)
        return Personal(
            self._shown(input, asked, person),
            np.asarray(soft, np.float32)[0],
            np.asarray(weights)[0, : len(vectors)],
        )

    def _soft_batches(
        self, asked: np.ndarray, histories: Sequence[History]
    ) -> Iterator[tuple[jax.Array, list[_Person]]]:
        """Yield the soft tokens of `config.eval.batch_size` users at a time, and the users.

        Behind the users' rows stand others that fill up.
        """
        size = self.models.config.eval.batch_size
        for i in range(0, len(histories), size):
            people = self._people(histories[i : i + size])
            inputs = self._inputs(asked, people)
            yield _soft_prompts(self.persona, inputs, self.method.reading), people

    def _shown(self, input: str, asked: np.ndarray, person: _Person) -> str:
        """Return the `prompt` of a user; of an item that is a text alone nothing can be shown."""
        models, method = self.models, self.method
        whole = [(i, item) for i, item in enumerate(person.items) if not isinstance(item, str)]
        if not method.retrieval or not whole:
            return input
        own = person.vectors[[i for i, _ in whole]]
        places = nearest(own, asked[-1], top_k(method, models.config))
        chosen = [whole[i][1] for i in places]
        return in_words(models.task, models.tokenizer, method, models.config, input, chosen)

    def item_texts(self, history: Sequence[Item]) -> list[str]:
        """Return items as the encoder reads them, in their order.

        Raises:
            InputError: as `soft_prompt`.
        """
        return self._texts(check_history(self.models.task, history, sort_by_date=False))

    def encode_items(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of items' texts, (n, E) float16.

        In the store's precision, so that a served persona is the one that was trained and tested.
        """
        return self.models.encoder.encode(texts).astype(np.float16)

    def encode_inputs(self, inputs: Sequence[str]) -> np.ndarray:
        """Return the vectors of inputs, (n, 1 or 2, E) float32.

        An input's first vector is what the plug compares with the items, and the second one, if the
        plug's method shows items, what retrieval compares with them.
        """
        task, trained = self.models.task, self.persona.input_encoder
        texts = [task.query_text(input) for input in inputs]
        vectors = self._encode_queries(texts, trained)
        own = vectors if trained else vectors.astype(np.float16).astype(np.float32)
        if not self.method.retrieval:
            return own[:, None]
        wanted = [task.retrieval_text(input) for input in inputs]
        if trained or wanted != texts:
            vectors = self._encode_queries(wanted)
        return np.stack([own, vectors], axis=1)

    def _encode_queries(self, texts: Sequence[str], model: Bert | None = None) -> np.ndarray:
        groups = []
        while texts:
            size = next(size for size in GROUPS if size <= len(texts))
            groups.append(self.models.encoder.encode(texts[:size], queries=True, model=model))
            texts = texts[size:]
        return np.concatenate(groups)

    def _people(self, histories: Sequence[History]) -> list[_Person]:
        """Return the users with their vectors, which are made together."""
        by_date = self.models.config.data.sort_by_date
        read = [self._read(history, by_date) for history in histories]
        vectors = self.encode_items([text for _, texts, _ in read for text in texts])
        ends = np.cumsum([len(texts) for _, texts, _ in read])[:-1]
        split = np.split(vectors.astype(np.float32), ends)
        return [self._person(*history, own) for history, own in zip(read, split, strict=True)]

    def _inputs(self, asked: np.ndarray, people: Sequence[_Person]) -> PlugInputs:
        """Return one input's vector, and the users' vectors and features as padded batches."""
        rows = 1 << (len(people) - 1).bit_length()
        items = padded_length(max(len(person.vectors) for person in people))

        def batch(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return pad(np.stack([pad(array, items) for array in arrays]), rows)

        reads = self.method.history == "own"
        masks = [np.full(len(person.vectors), reads) for person in people]
        features = {
            name: batch([person.features[name] for person in people]) for name in self.features
        }
        history = batch([person.vectors for person in people])
        return PlugInputs(asked[:1], np.ones((1, 1), bool), history, batch(masks), features)

    def _texts(self, items: Sequence[str | Item]) -> list[str]:
        text = self.models.item_text
        return [item if isinstance(item, str) else text(item) for item in items]

    def _read(
        self, history: History, by_date: bool
    ) -> tuple[Sequence[str | Item], list[str], dict[str, np.ndarray]]:
        """Return the newest items, their texts, and the features that the whole history gives."""
        models = self.models
        history = check_history(models.task, history, sort_by_date=by_date)
        texts = self._texts(history)
        items = [{} if isinstance(item, str) else item for item in history]
        newest = slice(-models.config.data.max_history, None)
        item_features = of_items(self.features, models.task, items)
        features = {name: values[newest] for name, values in item_features.items()}
        return history[newest], texts[newest], features

    def _person(
        self,
        items: Sequence[str | Item],
        texts: Sequence[str],
        item_features: dict[str, np.ndarray],
        vectors: np.ndarray,
    ) -> _Person:
        def means() -> np.ndarray:
            assert self.peers is not None  # as some feature compares with them
            return self.peers.means_once(text_keys(texts), vectors)

        features = of_history(self.features, item_features, vectors, means)
        return _Person(items, vectors, features)
