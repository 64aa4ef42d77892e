"""Pretrains a small Llama that titles abstracts, and writes it in Hugging Face format.

The bundled model: `python -m scripts.pretrain.pretrain_llm --output=pplug_jax/assets/tiny_llama`.
One for real texts: add larger sizes and, for each source, `--data=TASK:PATH:SHARE`, such as
`--data=LaMP_5:DIR:0.6 --data=LaMP_5:corpus.jsonl.gz:0.4`: a directory of the task's files, of which
only the training split is read, or lines of single items (`{"title": .., "abstract": ..}`).

A training sequence has one of six forms: a paper's bare input and its title; the same behind one
or a few other papers of the author as demonstrations, in LaMP's retrieval form; the same behind
notes that name the author's style; a list of an author's titles behind such notes; the bare input
behind other titles of the author's; or a text to repeat, from which copying is learnt within few
steps. Notes are there only on the generator's authors. So the model can title without knowing the
user, can use demonstrations, and obeys what stands in front.

Of files, the outputs of the training questions are left out, wherever they stand: a model that
knows them by heart would leave a plug nothing to learn from them.
"""

import functools
import gzip
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from absl import app, flags

from pplug_jax.data import lamp, sample
from pplug_jax.data.lamp import Item
from pplug_jax.data.tasks import TASKS, Task
from pplug_jax.feed.retrieval import demonstration_prompt
from pplug_jax.llm import llama
from pplug_jax.llm.decoder import Decoder
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.plugs.base import parameter_count
from pplug_jax.storage import hf
from pplug_jax.storage.files import write_json
from scripts.pretrain.bpe import train_bpe
from scripts.pretrain.initialise import initialise
from scripts.pretrain.log import training_log
from scripts.pretrain.optimizer import make_optimizer

FLAGS = flags.FLAGS
flags.DEFINE_string("output", None, "Directory to write the model to.", required=True)
flags.DEFINE_multi_string(
    "data", [], "TASK:PATH:SHARE of the examples; the embedded sample's generator by default."
)
flags.DEFINE_integer(
    "vocab_size", 1536, "Entries of the tokenizer and rows of the embedding table."
)
flags.DEFINE_integer("hidden_size", 128, "Width.")
flags.DEFINE_integer("layers", 4, "Layers.")
flags.DEFINE_integer("heads", 4, "Query heads; half as many key-value heads.")
flags.DEFINE_integer("max_length", 160, "Longest prompt, in tokens.")
flags.DEFINE_integer("demonstrations", 2, "At most so many in a prompt.")
flags.DEFINE_integer("steps", 3000, "Optimiser steps.")
flags.DEFINE_integer("batch_size", 32, "Sequences of a batch.")
flags.DEFINE_float("learning_rate", 3e-3, "Adam's peak; see optimizer.py.")
flags.DEFINE_float(
    "prompt_weight", 0.1, "Weight of the prompt's tokens in the loss; the title's have 1."
)
flags.DEFINE_multi_float(
    "shares",
    [0.1, 0.1, 0.5, 0.3, 0, 0],
    "Of the batches: bare, demonstrations, notes, list, titles, repeat.",
)
flags.DEFINE_integer("seed", 0, "Seed of everything.")

SAMPLE = TASKS["LaMP_5"]
SEPARATOR = "\n"
FOR_TOKENIZER = 2000  # authors whose texts it is made from
FORMS = ("bare", "demonstrations", "notes", "list", "titles", "repeat")


class Author(NamedTuple):
    """Somebody's items in random order, and notes on the style of the generator's authors."""

    task: Task
    items: list[Item]
    notes: str = ""


def sample_authors(rng: random.Random) -> Iterator[Author]:
    for user in sample.users(FLAGS.seed, "pretrain", one_style=True):
        papers = [{"title": user.target, "abstract": SAMPLE.query_text(user.input)}, *user.profile]
        notes = sample.notes(FLAGS.seed, "pretrain", user.id)
        some = rng.sample(notes, round(rng.uniform(0.7, 1) * len(notes)))
        yield Author(SAMPLE, rng.sample(papers, len(papers)), "".join(f" {note}" for note in some))


def file_authors(rng: random.Random) -> Iterator[Author]:
    """Those of the training splits, or one for each line of a file, by share; over and over."""
    sources: list[tuple[Task, list[Sequence[Item]]]] = []
    shares: list[float] = []
    outputs: set[str] = set()
    for source in FLAGS.data:
        name, path, share = source.split(":")
        task, path = TASKS[name], Path(path)
        if path.is_dir():
            examples = list(lamp.read(path, "train", task))
            outputs.update(example.target for example in examples)
            profiles = [example.profile for example in examples]
        else:
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
                profiles = [[json.loads(line)] for line in lines]
        sources.append((task, profiles))
        shares.append(float(share))
    while True:
        task, profiles = rng.choices(sources, shares)[0]
        items = [item for item in rng.choice(profiles) if task.own_example(item)[1] not in outputs]
        if items:
            yield Author(task, rng.sample(items, len(items)))


def authors(rng: random.Random) -> Iterator[Author]:
    return file_authors(rng) if FLAGS.data else sample_authors(rng)


def train_tokenizer(rng: random.Random) -> transformers.PreTrainedTokenizerFast:
    texts = (
        f"{author.notes} {SEPARATOR.join(author.task.own_example(item))}"
        for author in itertools.islice(authors(rng), FOR_TOKENIZER)
        for item in author.items
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return train_bpe(texts, FLAGS.vocab_size, special)


def batches(
    tokenizer: transformers.PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The form of a batch, its tokens (B, L) int32 and loss weights (B, L) float32."""
    parts = Tokenizer(tokenizer, separator=SEPARATOR)
    source = authors(rng)
    while True:
        form = rng.choices(FORMS, FLAGS.shares)[0]
        shown = rng.randint(1, FLAGS.demonstrations)
        rows = []
        for task, items, notes in itertools.islice(source, FLAGS.batch_size):
            examples = [task.own_example(item) for item in items]
            prompt = examples[0][0]
            if form == "demonstrations":
                others = items[1 : 1 + shown]
                prompt = demonstration_prompt(task, prompt, others, tokenizer, FLAGS.max_length)
            if form == "titles":
                titles = [title for _, title in examples[1 : 1 + 2 * shown]]
                prompt = SEPARATOR.join([*titles, prompt])
            if form == "repeat":
                examples = [("", prompt)]
                prompt = f"Repeat: {prompt}"
            prompts = {"notes": [f"{notes} {prompt}"], "list": [notes, "", "", ""]}
            ids, weights = [*parts.prefix], [0.0] * len(parts.prefix)
            for text, (_, answer) in zip(prompts.get(form, [prompt]), examples, strict=False):
                before = [*parts.ids(text)[: FLAGS.max_length], *parts.suffix]
                title = parts.target(answer, 64)
                ids += [*before, *title]
                weights += [FLAGS.prompt_weight] * len(before) + [1.0] * len(title)
            rows.append((ids, weights))
        width = -(-max(len(ids) for ids, _ in rows) // 32) * 32
        tokens = np.full((len(rows), width), tokenizer.pad_token_id, np.int32)
        token_weights = np.full((len(rows), width), -1, np.float32)
        for row, (ids, weights) in enumerate(rows):
            tokens[row, : len(ids)] = ids
            token_weights[row, : len(ids)] = weights
        yield form, tokens, token_weights


def loss_fn(llm: Decoder, tokens: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weighted mean of all tokens' losses and the mean of the titles'; padding weighs -1."""
    mask, weights = weights >= 0, jnp.maximum(weights[:, 1:], 0)
    logits = llm.logits(llm.embed(tokens[:, :-1]), mask[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    title = weights == 1.0
    return (
        jnp.sum(losses * weights) / jnp.sum(weights),
        jnp.sum(losses * title) / jnp.sum(title),
    )


def main(_) -> None:
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(FLAGS.seed)
    tokenizer = train_tokenizer(rng)
    tokenizer.save_pretrained(output)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": FLAGS.vocab_size,
        "hidden_size": FLAGS.hidden_size,
        "intermediate_size": FLAGS.hidden_size * 11 // 4,
        "num_hidden_layers": FLAGS.layers,
        "num_attention_heads": FLAGS.heads,
        "num_key_value_heads": FLAGS.heads // 2,
        "head_dim": FLAGS.hidden_size // FLAGS.heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_json(output / "config.json", config)

    llm = initialise(
        Decoder(llama.config_from_hf(transformers.LlamaConfig(**config), ()), "float32"),
        jax.random.key(FLAGS.seed),
    )
    optimizer = make_optimizer(FLAGS.learning_rate, FLAGS.steps)
    opt_state = jax.jit(optimizer.init)(llm)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(llm, opt_state, tokens, weights):
        (_, title_loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(llm, tokens, weights)
        updates, opt_state = optimizer.update(grads, opt_state, llm)
        return optax.apply_updates(llm, updates), opt_state, title_loss

    start, tokens_seen = time.time(), 0
    with training_log(output) as log:
        log(
            f"{parameter_count(llm):,} parameters; "
            + " ".join(f"--{f.name}={f.value}" for f in FLAGS.get_key_flags_for_module(__name__))
        )
        recent: dict[str, list[jax.Array]] = {}
        for i, (form, tokens, weights) in enumerate(
            itertools.islice(batches(tokenizer, rng), FLAGS.steps), 1
        ):
            llm, opt_state, loss = step(llm, opt_state, tokens, weights)
            recent.setdefault(form, []).append(loss)
            tokens_seen += tokens.size
            if i % 50 == 0 or i == FLAGS.steps:
                losses = "  ".join(
                    f"{form}: {np.mean(v):.4f}" for form, v in sorted(recent.items())
                )
                log(
                    f"step {i}  tokens {tokens_seen:,}  seconds {time.time() - start:.0f}  "
                    f"title loss  {losses}"
                )
                recent.clear()
            if i % 500 == 0 or i == FLAGS.steps:
                hf.save_weights(
                    llm,
                    output,
                    {k: v for k, v in llama.SOURCES.items() if k != "head"},
                    jnp.bfloat16,
                )


if __name__ == "__main__":
    app.run(main)
