"""Serving: a trained plug, its frozen LLM and a history in, a personal answer out."""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from pplug_jax.data.lamp import check_history, check_input
from pplug_jax.errors import InputError
from pplug_jax.feed.features import compare_with_peers, of_history, of_items
from pplug_jax.llm.generate import generate
from pplug_jax.methods.table import METHODS
from pplug_jax.plugs.forward import inputs_embeds
from pplug_jax.plugs.persona import UserEmbedder
from pplug_jax.plugs.reading import features_of
from pplug_jax.session import Models
from pplug_jax.storage.files import read_object
from pplug_jax.storage.workdir import CONFIG, upgraded


@jax.jit
def _soft_prompt(plug: UserEmbedder, *arrays: jax.Array) -> jax.Array:
    return plug(*arrays)


class Personalizer:
    """Answers for any user, also one never seen before: only their history is needed."""

    def __init__(self, models: Models, plug: UserEmbedder):
        self.models = models
        self.llm = models.llm  # loaded now, not by the first who asks
        self.plug = plug
        self.features = features_of(models.config.plug)
        self.peers = models.peers if compare_with_peers(self.features) else None

    @classmethod
    def from_checkpoint(cls, workdir: epath.PathLike) -> "Personalizer":
        """Loads what `pplug_jax.main` left in `workdir`.

        Raises:
            InputError: no run is there, or it has no trained plug yet, or its models are gone.
        """
        workdir = epath.Path(workdir)
        path = workdir / CONFIG
        if not path.is_file():
            raise InputError(f"{path}: no such file; {workdir} is not the workdir of a run")
        config = ml_collections.ConfigDict(upgraded(read_object(path)))
        models, method = Models(config, workdir), METHODS["pplug"]
        return cls(models, models.restore_weights(method, config, workdir))

    def soft_prompt(self, input: str, history: Sequence[str | dict[str, Any]] = ()) -> np.ndarray:
        """The soft tokens [I ; P] for this input, (k + 1, D) float32; k more for each feature.

        Args:
            input: the task's input, instruction included.
            history: profile items as the task's files have them, or the user's texts alone, which
                do not tell the form of an answer; none gives the null persona.

        Raises:
            InputError: an item lacks a field of the task or has a mistyped one; the message names
                its place.
        """
        return np.asarray(self._soft_prompt(input, history)[0], np.float32)

    def _soft_prompt(self, input: str, history: Sequence[str | dict[str, Any]]) -> jax.Array:
        models, encoder = self.models, self.models.encoder
        check_input(input)
        by_date = models.config.data.sort_by_date
        history = check_history(models.task, history, sort_by_date=by_date)
        texts = [item if isinstance(item, str) else models.item_text(item) for item in history]
        items = [{} if isinstance(item, str) else item for item in history]
        newest = slice(-models.config.data.max_history, None)
        texts = texts[newest]
        told = {name: values[newest] for name, values in of_items(models.task, items).items()}
        query = np.array(encoder.queries([models.task.query_text(input)]), np.int32)
        # The store's precision, so that a served persona is the one that was trained and tested.
        vectors = encoder.encode(texts).astype(np.float16).astype(np.float32)

        def means() -> np.ndarray:
            own = models.store.rows([text for text in texts if text in models.store])
            return self.peers.means_of(vectors, own)

        features = of_history(self.features, told, vectors, means)

        def row(items: np.ndarray) -> np.ndarray:
            # One masked item stands in for an empty history, whose width would be 0.
            return np.pad(items, [(0, not texts), *[(0, 0)] * (items.ndim - 1)])[None]

        arrays = jax.tree.map(row, (vectors, np.ones(len(texts), bool), features))
        return _soft_prompt(self.plug, query, np.ones(query.shape, bool), *arrays)

    def generate(self, input: str, history: Sequence[str | dict[str, Any]] = ()) -> str:
        """The LLM's answer to `input` for the user of `history`, decoded as in the evaluation.

        Takes and raises what `soft_prompt` does.
        """
        models = self.models
        soft = self._soft_prompt(input, history)
        behind = models.config.plug.place == "behind"
        length = models.config.data.max_input_length
        prompt = models.tokenizer.prompt(input, length, behind)[None]
        there = np.ones(prompt.shape, bool)
        place = models.tokenizer.place(behind)
        embeds, mask, context = inputs_embeds(self.llm, soft, prompt, there, place)
        tokens = generate(
            self.llm,
            embeds,
            mask,
            max_new_tokens=models.config.eval.max_new_tokens,
            num_beams=models.config.eval.num_beams,
            length_penalty=models.config.eval.length_penalty,
            **context,
        )
        return models.tokenizer.decode(np.asarray(tokens[0]))
