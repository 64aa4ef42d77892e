"""Pretrains a small BERT sentence encoder on the embedded sample's papers.

Writes it in Hugging Face format. The bundled model:
`python -m scripts.pretrain.pretrain_encoder --output=pplug_jax/assets/tiny_bert`.

Two goals, as in the making of general-purpose encoders: an abstract lies nearer to a paper of the
same author and kind than to other authors' papers (InfoNCE over the batch), and a text's vector
tells which words its title has (a linear bag-of-words decoder, the idea of RetroMAE's and DupMAE's
weak decoders). The authors are none of those that the plug is trained or tested on.
"""

import functools
import itertools
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from absl import app, flags
from flax import nnx

from pplug_jax.data import sample
from pplug_jax.data.tasks import TASKS
from pplug_jax.encoder import bert
from pplug_jax.storage import hf
from pplug_jax.storage.files import write_json
from scripts.pretrain.bpe import train_bpe
from scripts.pretrain.initialise import initialise
from scripts.pretrain.log import training_log
from scripts.pretrain.optimizer import make_optimizer

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Directory to write the model to.", required=True)
flags.DEFINE_integer(
    "vocab_size", 1536, "Entries of the tokenizer and rows of the embedding table."
)
flags.DEFINE_integer("hidden_size", 128, "Width.")
flags.DEFINE_integer("layers", 2, "Layers.")
flags.DEFINE_integer("max_length", 64, "Longest text, in tokens.")
flags.DEFINE_integer("steps", 600, "Optimiser steps.")
flags.DEFINE_integer("batch_size", 64, "Authors of a batch, an abstract and a paper each.")
flags.DEFINE_float("learning_rate", 3e-3, "Adam's peak; see optimizer.py.")
flags.DEFINE_float("temperature", 0.1, "Of the InfoNCE loss.")
flags.DEFINE_integer("seed", 0, "Seed of everything.")

TASK = TASKS["LaMP_5"]
FOR_TOKENIZER = 10_000  # authors with two papers each that it is made from


def pairs() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Two papers of one author and one kind, author after author, without end."""
    rng = random.Random(FLAGS.seed)
    for user in sample.users(FLAGS.seed, "pretrain"):
        first, *others = rng.sample(user.profile, len(user.profile))
        kind = sample.kind_of(first["abstract"])
        alike = (paper for paper in others if sample.kind_of(paper["abstract"]) == kind)
        if second := next(alike, None):
            yield first, second


def train_tokenizer() -> transformers.PreTrainedTokenizerFast:
    papers = itertools.chain.from_iterable(itertools.islice(pairs(), FOR_TOKENIZER))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return train_bpe(
        map(TASK.item_text, papers), FLAGS.vocab_size, special, template="[CLS] $A [SEP]"
    )


def loss_fn(
    params: tuple, tokens: jax.Array, titles: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """tokens (2 B, L) and their titles' (2 B, T), the abstracts before the papers."""
    model, decoder = params
    vectors = model(tokens, tokens != 0)
    first, second = jnp.split(vectors, 2)
    similarity = first @ second.T / FLAGS.temperature
    labels = jnp.arange(len(first))
    same = optax.softmax_cross_entropy_with_integer_labels
    contrast = (same(similarity, labels).mean() + same(similarity.T, labels).mean()) / 2
    log_probs = jax.nn.log_softmax(vectors @ decoder * FLAGS.hidden_size**0.5)
    mask = titles != 0
    words = -jnp.sum(jnp.take_along_axis(log_probs, titles, axis=1) * mask) / jnp.sum(mask)
    return contrast + words, (contrast, words)


def main(_) -> None:
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(output)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": FLAGS.vocab_size,
        "hidden_size": FLAGS.hidden_size,
        "intermediate_size": 2 * FLAGS.hidden_size,
        "num_hidden_layers": FLAGS.layers,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "max_position_embeddings": 128,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-12,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_json(output / "config.json", config)
    pooling = {"word_embedding_dimension": FLAGS.hidden_size, "pooling_mode_mean_tokens": True}
    write_json(output / "1_Pooling" / "config.json", pooling)

    key, decoder_key = jax.random.split(jax.random.key(FLAGS.seed))
    model = initialise(bert.Bert(bert.config_from_hf(config), "mean", nnx.Param), key)
    decoder = jax.random.normal(decoder_key, (FLAGS.hidden_size, FLAGS.vocab_size))
    params = (model, decoder * FLAGS.hidden_size**-0.5)
    optimizer = make_optimizer(FLAGS.learning_rate, FLAGS.steps)
    opt_state = jax.jit(optimizer.init)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, *tokens):
        (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    def encode(texts: Iterable[str], length: int, **settings: Any) -> np.ndarray:
        settings |= {"truncation": True, "max_length": length, "padding": "max_length"}
        return np.array(tokenizer(list(texts), **settings)["input_ids"], np.int32)

    source, start, recent = pairs(), time.time(), []
    with training_log(output) as log:
        log(" ".join(f"--{f.name}={f.value}" for f in FLAGS.get_key_flags_for_module(__name__)))
        for i in range(1, FLAGS.steps + 1):
            batch = list(itertools.islice(source, FLAGS.batch_size))
            papers = [first for first, _ in batch] + [second for _, second in batch]
            texts = [first["abstract"] for first, _ in batch]
            texts += [TASK.item_text(second) for _, second in batch]
            texts = encode(texts, FLAGS.max_length)
            titles = encode((paper["title"] for paper in papers), 32, add_special_tokens=False)
            params, opt_state, losses = step(params, opt_state, texts, titles)
            recent.append(losses)
            if i % 50 == 0 or i == FLAGS.steps:
                contrast, words = np.mean(recent, axis=0)
                log(
                    f"step {i}  seconds {time.time() - start:.0f}  "
                    f"contrast {contrast:.4f}  words {words:.4f}"
                )
                recent.clear()
    hf.save_weights(params[0], output, bert.SOURCES, jnp.bfloat16)


if __name__ == "__main__":
    app.run(main)
