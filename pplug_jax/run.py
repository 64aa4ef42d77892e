"""Run the command: say what will be done, then encode, train and evaluate."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from pplug_jax.config import check_answers, checked, claim_workdir
from pplug_jax.data.answers import learnt, task_of
from pplug_jax.data.check import check_data
from pplug_jax.data.download import download
from pplug_jax.data.lamp import Example
from pplug_jax.data.records import raise_bad
from pplug_jax.data.sources import (
    data_directory,
    data_name,
    existing_directory,
    part_of,
    read_split,
    report_bad,
)
from pplug_jax.data.tasks import TASKS
from pplug_jax.errors import ConfigError, DataError, InputError
from pplug_jax.evaluate.compare import compare_methods
from pplug_jax.evaluate.run import evaluate
from pplug_jax.methods.table import asked_for, configured, read_variants
from pplug_jax.plugs.base import parameter_count
from pplug_jax.plugs.reading import soft_tokens
from pplug_jax.runtime.console import say
from pplug_jax.scoring.metrics import check_metrics
from pplug_jax.scoring.plots import plot_losses
from pplug_jax.session import Models
from pplug_jax.session.models import history_store
from pplug_jax.session.on_ray import encode_on_ray
from pplug_jax.session.weights import abstract_weights
from pplug_jax.settings import Settings
from pplug_jax.storage.lock import locked
from pplug_jax.storage.workdir import METRICS, plot_path
from pplug_jax.train.inputs import TrainingInputs
from pplug_jax.train.loop import Trainer


def describe(models: Models, train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Print what is about to be done."""
    config = models.config
    frozen = parameter_count(models.abstract_llm)
    trainable: dict[int, list[str]] = defaultdict(list)
    for method in asked_for(config):
        if method.trained:
            settings = configured(config, method, config.seed)
            count = abstract_weights(models, method, settings).trained(method.reading)
            trainable[count].append(method.name)
    data = data_name(config)
    if data_directory(config) is None:
        data += ", made up by a generator (for real data: --config.data.path=DIR with LaMP's files)"
    task = task_of(config)
    if task.answers and task.answer:
        data += f"; the items' {task.answer} is what the output is"
    elif task.answers:
        data += "; no field of the items is known to be what the output is (config.data.answer)"
    mesh = " x ".join(f"{axis}={size}" for axis, size in models.mesh.shape.items())
    for name, text in {
        "task": config.task,
        "data": data,
        "examples": f"{len(train)} to train on ({config.data.train_split}), "
        f"{len(held_out)} held out ({config.data.eval_split})",
        "frozen LLM": f"{config.llm.path}, {frozen:,} parameters, "
        + (config.llm.quantize or config.llm.dtype),
        "prompt": models.tokenizer.layout(
            soft_tokens(config.plug), behind=config.plug.place == "behind"
        ),
        "encoder": f"{config.encoder.path}, width {models.encoder.size}, "
        f"{models.encoder.model.pooling} pooling, at most {models.encoder.max_length} tokens, "
        f"{models.encoder.query_prefix!r} before inputs, {models.encoder.item_prefix!r} before "
        "history texts",
        "trainable": "; ".join(
            f"{count:,} parameters, {count / (count + frozen):.1%} of all ({', '.join(names)})"
            for count, names in trainable.items()
        )
        or "nothing",
        "methods": ", ".join(config.methods),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {mesh}",
        "workdir": str(models.workdir),
    }.items():
        say(f"{name:>12}  {text}")
    if not models.tokenizer.end:
        say(
            f"warning: neither {config.llm.path}'s config.json nor its tokenizer names an end of "
            f"sequence: every answer has config.eval.max_new_tokens = {config.eval.max_new_tokens} "
            "tokens"
        )


@dataclasses.dataclass(frozen=True)
class Histories(Sequence[tuple[str, list[str]]]):
    """Whose the examples' histories are and their texts, read when they are asked for."""

    splits: Sequence[Sequence[Example]]
    texts: Callable[[Example], tuple[str, list[str]]]

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __getitem__(self, i: int) -> tuple[str, list[str]]:  # type: ignore[override]  # no slices
        for split in self.splits:
            if i < len(split):
                return self.texts(split[i])
            i -= len(split)
        raise IndexError


def check_files(config: Settings, mode: str) -> None:
    """Check the task's files and say what is in them; the mode `download` fetches them first.

    Raises:
        InputError: a file is unavailable or unreadable, or a record is bad.
    """
    directory = data_directory(config)
    if directory is None:
        raise ConfigError(
            "the embedded sample needs no files; name a directory for real ones: "
            "--config.data.path=DIR"
        )
    task = TASKS[config.task]
    splits: list[str] = []
    if mode == "download":
        asked = config.data.train_split, config.data.eval_split
        splits = list(dict.fromkeys(part_of(split)[0] for split in asked))
        time_based, base_url = config.data.time_based, config.data.base_url
        download(task.name, splits, directory, time_based=time_based, base_url=base_url)
    bad = check_data(existing_directory(config, config.data.train_split), task, splits)
    if bad:
        raise InputError(
            f"bad records, listed above: {bad}; mend them, or leave them out with "
            "--config.data.on_error=skip"
        )


def run(
    given: ml_collections.ConfigDict,
    workdir: Path,
    mode: str,
    ray: dict[str, Any] | None = None,
) -> None:
    """Do what `mode` says; started again, it goes on from where it stopped.

    Args:
        given: the config.
        workdir: the run's directory.
        mode: a value of `--mode`.
        ray: of the mode `encode`, the settings of `encode_on_ray`; None is to encode here.
    """
    config = checked(given)
    if mode in ("download", "check_data"):
        check_files(config, mode)
        return
    if mode in ("evaluate", "train_and_evaluate", "compare"):
        check_metrics(config.task)
    if idle := [name for name in read_variants(config.variants) if name not in config.methods]:
        say(f"config.variants: not in config.methods, and so not run: {', '.join(idle)}")
    bad: list[DataError] = []
    on_bad = bad.append if config.data.on_error == "skip" else raise_bad
    trained = any(method.trained for method in asked_for(config))
    train = read_split(config, "train", on_bad) if trained and mode != "evaluate" else []
    held_out = read_split(config, "eval", on_bad)
    if train and train[0].target is None:
        raise ConfigError(
            f"config.data.train_split: {config.data.train_split} has no outputs to train on; leave "
            "trained methods out of config.methods, or name another split"
        )
    for split, examples in ((config.data.train_split, train), (config.data.eval_split, held_out)):
        if examples and not any(example.profile for example in examples):
            say(f"{split}: no user has a history, so that a plug has nothing to read here")
    config = learnt(config, workdir, train or held_out)
    check_answers(config)
    with locked(workdir):
        _work(config, workdir, mode, train, held_out, bad, ray)


def _work(
    config: Settings,
    workdir: Path,
    mode: str,
    train: Sequence[Example],
    held_out: Sequence[Example],
    bad: Sequence[DataError],
    ray: dict[str, Any] | None,
) -> None:
    """Do the part of `run` that needs the lock on the workdir."""
    models = Models(config, workdir)
    claim_workdir(workdir, config)
    describe(models, train, held_out)
    if bad:
        report_bad(workdir, bad)
    if mode == "convert":
        converted = models.convert_llm()
        say(f"{models.converted}: the converted LLM {'is' if converted else 'was already'} there")
        return
    histories = Histories((train, held_out), models.history_texts)
    models.store.trim()
    if ray is None:
        new = models.store.add(histories, config.encoder.batch_size)
    else:
        open_store = functools.partial(history_store, config, workdir)
        if models.store.directory.startswith("memory:"):
            raise ConfigError("config.data.history_store: Ray's workers share no memory")
        size = config.encoder.batch_size
        new, models.encoder.cut_texts = encode_on_ray(open_store, histories, size, **ray)
    say(f"history store: {len(models.store)} texts of users; {new} were encoded now")
    if models.encoder.cut_texts:
        say(
            f"{models.encoder.cut_texts} of them reach the encoder's {models.encoder.max_length} "
            "tokens; what is beyond is not read (config.encoder.max_length)"
        )
    if mode == "compare":
        compare_methods(models, train, held_out)
    if mode in ("train", "train_and_evaluate") and train:
        training = TrainingInputs(models, train)
        training.save_peers()
        for method in (method for method in asked_for(config) if method.trained):
            settings = configured(config, method, config.seed)
            examples, validation = training(method, settings), training.validation(method, settings)
            Trainer(models, method, settings, examples, workdir, validation).fit()
            plot_losses(workdir / METRICS, plot_path(workdir, "loss"))
    if mode in ("evaluate", "train_and_evaluate"):
        evaluate(models, held_out)
