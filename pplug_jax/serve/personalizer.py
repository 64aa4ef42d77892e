"""Serve a trained plug: from a history and an input to a personal answer of the frozen LLM."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from pplug_jax.data.keys import text_keys
from pplug_jax.data.lamp import Item, check_history, check_input
from pplug_jax.errors import InputError
from pplug_jax.feed.batches import PlugInputs, round_up
from pplug_jax.feed.features import compare_with_peers, of_history, of_items
from pplug_jax.llm import LLM
from pplug_jax.methods.shown import layout_of
from pplug_jax.plugs.forward import continuation
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.plugs.reading import features_of, soft_tokens
from pplug_jax.runtime.console import say
from pplug_jax.serve.handover import (
    CARD,
    METHOD,
    PLUG_CONFIG,
    WEIGHTS,
    read_plug,
    upload,
    write_plug,
)
from pplug_jax.session import Models
from pplug_jax.session.weights import restore_weights
from pplug_jax.settings import Settings, upgraded
from pplug_jax.storage.files import read_object
from pplug_jax.storage.workdir import CONFIG

History = Sequence[str | dict[str, Any]]
GROUPS = (16, 4, 1)  # inputs that are encoded together: few numbers, for each is compiled


@jax.jit
def _soft_prompts(plug: UserEmbedder, inputs: PlugInputs) -> jax.Array:
    return plug(inputs)


@jax.jit
def _soft_and_weights(plug: UserEmbedder, inputs: PlugInputs) -> tuple[jax.Array, jax.Array]:
    return plug(inputs), plug.attention(inputs)


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


def _read_run(workdir: epath.PathLike) -> tuple[Models, UserEmbedder]:
    """Load a run's models and its trained plug."""
    workdir = epath.Path(workdir)
    path = workdir / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file; {workdir} is not the workdir of a run")
    config = Settings.of(upgraded(read_object(path)))
    if METHOD.name not in config.methods:
        raise InputError(
            f"{workdir}: the run's methods are {', '.join(config.methods)}, and only "
            f"{METHOD.name!r} can be served; train it (config.methods)"
        )
    models = Models(config, workdir)
    plug = restore_weights(models, METHOD, config, workdir)
    assert isinstance(plug, UserEmbedder)  # as METHOD's are
    return models, plug


def export(workdir: epath.PathLike, output: Path) -> None:
    """Write the plug of the run in `workdir` to `output`, for `Personalizer.from_pretrained`.

    Raises:
        InputError: `workdir` has no trained plug, or `output` cannot be written.
    """
    write_plug(*_read_run(workdir), output)
    size = (output / WEIGHTS).stat().st_size
    say(f"{output}: the plug ({WEIGHTS}, {size / 1e6:.1f} MB), {PLUG_CONFIG} and a model card")
    say(f"look at {output / CARD}; `hf upload ORG/NAME {output}` puts it on the hub")


class Personalizer:
    """A trained plug and its LLM, which answer for any user, even a new one, by the history alone.

    Lengths are padded to a few sizes, so that soon no request compiles anything.

    Args:
        models: the run's models.
        plug: the trained plug.
    """

    def __init__(self, models: Models, plug: UserEmbedder):
        self.models = models
        self.plug = plug
        self.features = features_of(models.config.plug)
        self.peers = models.peers if compare_with_peers(self.features) else None
        self.layout = layout_of(METHOD, models.config)

    @classmethod
    def from_checkpoint(cls, workdir: epath.PathLike) -> "Personalizer":
        """Load the run that `pplug_jax.main` left in `workdir`.

        Raises:
            InputError: `workdir` has no run or no trained plug yet, or its models are gone.
        """
        return cls(*_read_run(workdir))

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
            write_plug(self.models, self.plug, Path(directory))
            return upload(Path(directory), repository)

    @property
    def longest_prompt(self) -> int:
        """The most tokens that the LLM reads of a prompt, soft ones included."""
        tokenizer, config = self.models.tokenizer, self.models.config
        around = len(tokenizer.prefix) + len(tokenizer.suffix) + soft_tokens(config.plug)
        joint = len(tokenizer.ids(tokenizer.joint)) if self.layout.behind else 0
        return around + config.data.max_input_length + joint

    @property
    def own_rows(self) -> int:
        """How many rows of a prompt stand behind its input; 0 if the soft tokens do not."""
        if not self.layout.behind:
            return 0
        return soft_tokens(self.models.config.plug) + len(self.models.tokenizer.suffix)

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
        batches = self._soft_batches(input, histories)
        soft = [np.asarray(x, np.float32)[:count] for x, count in batches]
        none = 0, soft_tokens(self.models.config.plug), self.models.abstract_llm.config.hidden_size
        return np.concatenate([np.zeros(none, np.float32), *soft])

    def inputs_embeds(self, input: str, soft: np.ndarray) -> np.ndarray:
        """Return all that the LLM reads, the soft tokens in their place, (L, D) float32.

        Any server that takes a prompt as embeddings can go on from there.

        Args:
            input: as in `soft_prompt`.
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

        With soft tokens behind the input, the LLM reads it once for `config.eval.batch_size` users.

        Args:
            input: as in `soft_prompt`.
            histories: the users' histories, each as in `soft_prompt`.

        Raises:
            InputError: as `soft_prompt`.
        """
        models, config = self.models, self.models.config
        tokenizer, behind = models.tokenizer, self.layout.behind
        check_input(input)
        ids = tokenizer.prompt(input, config.data.max_input_length, behind)
        prompt, mask = row(ids, padded_length(len(ids)))
        answers = []
        for soft, count in self._soft_batches(input, histories):
            copies = 1 if behind else len(soft)
            tokens = _answers(
                models.llm,
                soft,
                np.repeat(prompt, copies, axis=0),
                np.repeat(mask, copies, axis=0),
                place=tokenizer.place(behind),
                **config.eval.decoding,
            )
            answers += [tokenizer.decode(row) for row in np.asarray(tokens)[:count]]
        return answers

    def _soft_batches(
        self, input: str, histories: Sequence[History]
    ) -> Iterator[tuple[jax.Array, int]]:
        """Yield `_soft_prompts` of `config.eval.batch_size` users at a time, for one query."""
        check_input(input)
        query, size = self.encode_inputs([input]), self.models.config.eval.batch_size
        for i in range(0, len(histories), size):
            yield self._soft_prompts(query, histories[i : i + size])

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
        """Return the vectors of inputs, (n, E) float32, as the plug compares them with items."""
        trained, encode = self.plug.input_encoder, self.models.encoder.encode
        texts = [self.models.task.query_text(input) for input in inputs]
        groups = []
        while texts:
            size = next(size for size in GROUPS if size <= len(texts))
            groups.append(encode(texts[:size], queries=True, model=trained))
            texts = texts[size:]
        vectors = np.concatenate(groups)
        return vectors.astype(np.float16).astype(np.float32) if trained is None else vectors

    def persona_of(
        self, query: np.ndarray, history: Sequence[Item], vectors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the soft tokens for one user whose vectors are known, and the items' weights.

        Args:
            query: (1, E), the input's vector, as `encode_inputs` makes it.
            history: the user's newest items, in order.
            vectors: (n, E), the items' vectors, as `encode_items` makes them.

        Returns:
            (k + 1, D) float32 and (n,) float32, which add up to 1.

        Raises:
            InputError: as `soft_prompt`.
        """
        texts, item_features = self._read(history)
        vectors = vectors.astype(np.float32)
        users = [(vectors, self._features(texts, item_features, vectors))]
        soft, weights = _soft_and_weights(self.plug, self._inputs(query, users))
        return np.asarray(soft, np.float32)[0], np.asarray(weights)[0, : len(vectors)]

    def _soft_prompts(
        self, query: np.ndarray, histories: Sequence[History]
    ) -> tuple[jax.Array, int]:
        """Return the users' soft tokens, behind them rows that fill up, and the number of users."""
        read = [self._read(history) for history in histories]
        texts = [text for texts, _ in read for text in texts]
        vectors = self.encode_items(texts).astype(np.float32)
        ends = np.cumsum([len(texts) for texts, _ in read])[:-1]
        users = [
            (user_vectors, self._features(texts, item_features, user_vectors))
            for (texts, item_features), user_vectors in zip(
                read, np.split(vectors, ends), strict=True
            )
        ]
        return _soft_prompts(self.plug, self._inputs(query, users)), len(users)

    def _inputs(
        self,
        query: np.ndarray,
        users: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]],
    ) -> PlugInputs:
        """Return one query, and the users' vectors and features as padded batches."""
        rows = 1 << (len(users) - 1).bit_length()
        items = padded_length(max(len(user_vectors) for user_vectors, _ in users))

        def batch(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return pad(np.stack([pad(array, items) for array in arrays]), rows)

        masks = [np.ones(len(user_vectors), bool) for user_vectors, _ in users]
        features = {
            name: batch([features[name] for _, features in users]) for name in self.features
        }
        history = batch([user_vectors for user_vectors, _ in users])
        return PlugInputs(query, np.ones((1, 1), bool), history, batch(masks), features)

    def _texts(self, items: Sequence[str | Item]) -> list[str]:
        text = self.models.item_text
        return [item if isinstance(item, str) else text(item) for item in items]

    def _read(self, history: History) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return the newest items' texts, and the features that the whole history gives them."""
        models = self.models
        by_date = models.config.data.sort_by_date
        history = check_history(models.task, history, sort_by_date=by_date)
        texts = self._texts(history)
        items = [{} if isinstance(item, str) else item for item in history]
        newest = slice(-models.config.data.max_history, None)
        item_features = of_items(self.features, models.task, items)
        return texts[newest], {name: values[newest] for name, values in item_features.items()}

    def _features(
        self, texts: Sequence[str], item_features: dict[str, np.ndarray], vectors: np.ndarray
    ) -> dict[str, np.ndarray]:
        def means() -> np.ndarray:
            assert self.peers is not None  # as some feature compares with them
            return self.peers.means_once(text_keys(texts), vectors)

        return of_history(self.features, item_features, vectors, means)
