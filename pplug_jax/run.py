"""One run of the command: say what will be done, then encode, train and evaluate."""

from pathlib import Path

import jax
import ml_collections

from pplug_jax.config import ConfigError, check_config, claim_workdir
from pplug_jax.data import lamp, sample
from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS
from pplug_jax.evaluate import evaluate
from pplug_jax.methods import METHODS
from pplug_jax.models import Models, parameter_count
from pplug_jax.plots import plot_losses
from pplug_jax.progress import say
from pplug_jax.train import fit


def read_examples(
    config: ml_collections.ConfigDict, split: str, sample_users: int
) -> list[Example]:
    """A split: from LaMP files where `config.data.path` names them, else from the embedded sample.

    Raises:
        ConfigError, DataError: a missing directory, a broken file, or no example at all.
    """
    path = config.data.path
    if not path:
        return list(sample.users(config.seed, split, sample_users))
    if not Path(path).is_dir():
        raise ConfigError(
            f"config.data.path: there is no directory {path!r}; it should hold LaMP's "
            f"{split}_questions.json and {split}_outputs.json"
        )
    examples = lamp.read(path, split, TASKS[config.task])
    if not examples:
        raise lamp.DataError(f"{path}: the split {split} has no questions")
    return examples


def describe(models: Models, train: list[Example], held_out: list[Example]) -> None:
    """Prints what is about to be done."""
    config = models.config
    trainable, frozen = parameter_count(models.abstract_plug), parameter_count(models.llm)
    data = config.data.path or (
        "the embedded sample, made up by a generator "
        "(for real data: --config.data.path=DIR with LaMP's files)"
    )
    mesh = " x ".join(f"{axis}={size}" for axis, size in models.mesh.shape.items())
    for name, text in {
        "task": config.task,
        "data": data,
        "examples": f"{len(train)} to train on ({config.data.train_split}), "
        f"{len(held_out)} held out ({config.data.eval_split})",
        "frozen LLM": f"{config.llm.path}, {frozen:,} parameters, "
        + (config.llm.quantize or config.llm.dtype),
        "prompt": models.tokenizer.layout(1 + config.plug.num_persona_tokens),
        "encoder": f"{config.encoder.path}, width {models.encoder.size}, "
        f"{models.encoder.model.pooling} pooling",
        "trainable": f"{trainable:,} parameters, {trainable / (trainable + frozen):.1%} of all",
        "methods": ", ".join(config.methods),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {mesh}",
        "workdir": str(models.workdir),
    }.items():
        say(f"{name:>12}  {text}")


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
    """Does what `mode` says; started again, it goes on where it stopped."""
    check_config(config)
    train = read_examples(config, config.data.train_split, config.data.sample_train_users)
    held_out = read_examples(config, config.data.eval_split, config.data.sample_eval_users)
    models = Models(config, workdir)
    claim_workdir(workdir, config)
    describe(models, train, held_out)
    if mode == "convert":
        new = models.convert_llm()
        say(f"{models.converted}: the converted LLM {'is' if new else 'was already'} there")
        return
    items = (item for example in (*train, *held_out) for item in example.profile)
    new = models.store.add(map(models.task.item_text, items), config.encoder.batch_size)
    say(f"history store: {len(models.store)} unique texts, {new} of them new")
    if models.encoder.cut_texts:
        say(
            f"{models.encoder.cut_texts} of them reach the encoder's {models.encoder.max_length} "
            "tokens; what is beyond is not read (config.encoder.max_length)"
        )
    if mode in ("train", "train_and_evaluate"):
        for name in config.methods:
            if METHODS[name].trained:
                fit(models, train, METHODS[name])
                plot_losses(workdir / "metrics.jsonl", workdir / "plots" / "loss.png")
    if mode in ("evaluate", "train_and_evaluate"):
        evaluate(models, held_out)
