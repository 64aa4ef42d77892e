"""One input for many users: `python -m benchmarks.fan_out [--llm_path=DIR] [--users=1,8,64,256]`

An input of 250 tokens is answered for users of 5 to 100 items by a trained plug's `Personalizer`:
all together with the soft tokens behind the input, which is read once; all together with them in
front, so that each user's input is read anew; and one user after another, behind. What is together
must be, word for word, what each gets alone. Histories are vectors already, as a service keeps
them. By default the LLM is that of `benchmarks.train_step`, of random weights; `DIR` has another.
"""

import functools
import tempfile
import zlib
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks.timing import in_turn, report
from benchmarks.train_step import placed, write_models
from configs import common
from pplug_jax.methods.table import METHODS
from pplug_jax.serve.personalizer import Personalizer
from pplug_jax.session import Models
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import Settings

FLAGS = flags.FLAGS
flags.DEFINE_string("llm_path", None, "A directory with an LLM; by default a random Llama.")
flags.DEFINE_list("users", ["1", "8", "64", "256"], "Users of one input.")
flags.DEFINE_integer("tokens", 16, "New tokens of an answer.")
flags.DEFINE_integer("alone", 8, "Users who are timed one after another.")
FLAGS.set_default("repeats", 3)

INPUT_TOKENS = 250
HEADER = ("users", "together, users/s", "in front", "one by one", "over front", "over one by one")


def read_settings(scratch: Path) -> Settings:
    config = common.task_config("LaMP_5", "embedded")
    config.llm.path = FLAGS.llm_path or str(scratch / "llm")
    config.llm.dtype = "float32"
    config.encoder.path = str(scratch / "encoder")
    config.plug.update(place="behind", encoder_rate=0.0, num_persona_tokens=4)
    config.eval.update(num_beams=1, max_new_tokens=FLAGS.tokens, batch_size=64)
    return Settings.of(config)


def make_input(models: Models) -> str:
    """Words of about so many tokens as an article has."""
    rng = np.random.default_rng(0)
    words = ["rivers", "measure", "under", "simple", "lights", "for", "analysts", "music"]
    text = ""
    while len(models.tokenizer.ids(text)) < INPUT_TOKENS:
        text += " " + words[rng.integers(len(words))]
    return text.strip()


def make_histories(count: int) -> list[list[str]]:
    rng = np.random.default_rng(1)
    return [[f"user {u}, text {i}" for i in range(rng.integers(5, 101))] for u in range(count)]


def serve(models: Models, place: str) -> Personalizer:
    """A plug that reads no text anew."""
    models = placed(models, place)
    weights = new_weights(models, METHODS["pplug"], models.config)
    return Personalizer(models, weights)


def keep_vectors(models: Models) -> None:
    """Lets the encoder give made-up vectors, the same ones each time, at once."""

    @functools.cache
    def vector(text: str) -> np.ndarray:
        drawn = np.random.default_rng(zlib.crc32(text.encode())).normal(size=models.encoder.size)
        return drawn / np.linalg.norm(drawn)

    def encode(texts: list[str], *_: object, **__: object) -> np.ndarray:
        return np.array([vector(text) for text in texts])

    models.encoder.encode = encode


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch))
        models = Models(read_settings(Path(scratch)), Path(scratch) / "run")
        models.llm  # noqa: B018  # loaded while its files are there
        keep_vectors(models)
        behind, front = serve(models, "behind"), serve(models, "front")
        text, rows, records = make_input(models), [], []
        for count in map(int, FLAGS.users):
            histories = make_histories(count)
            alone = histories[: FLAGS.alone]
            each = [behind.generate(text, history) for history in alone]
            together = behind.generate_many(text, histories)
            assert together[: len(each)] == each, "a user got another answer in company"
            cases = {
                "together": lambda many=histories: behind.generate_many(text, many),
                "in front": lambda many=histories: front.generate_many(text, many),
                "one by one": lambda few=alone: [behind.generate(text, one) for one in few],
            }
            seconds = in_turn(cases)
            users = {name: count for name in cases} | {"one by one": len(alone)}
            rate = {name: users[name] / seconds[name] for name in cases}
            records.append({"users": count} | rate)
            over = [rate["together"] / rate[name] for name in ("in front", "one by one")]
            rows.append(
                (str(count), *(f"{x:.2f}" for x in rate.values()), *(f"{x:.2f}x" for x in over))
            )
    llm = FLAGS.llm_path or "a random Llama"
    title = f"one input of {INPUT_TOKENS} tokens, {FLAGS.tokens} new ones, {llm}"
    report("fan_out", title, HEADER, rows, records)


if __name__ == "__main__":
    app.run(main)
