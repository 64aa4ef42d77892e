"""Check a config: that it can work, and that a workdir belongs to it."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from pplug_jax.data.answers import task_of
from pplug_jax.data.tasks import TASKS
from pplug_jax.encoder.bert import POOLINGS
from pplug_jax.errors import ConfigError
from pplug_jax.feed.features import FEATURES
from pplug_jax.feed.shards import NUMBERS
from pplug_jax.llm.quantize import KINDS
from pplug_jax.methods.table import (
    PAPER_PLUG,
    Changes,
    Method,
    asked_for,
    configured,
    methods_of,
    read_variants,
)
from pplug_jax.runtime.distributed import wait_for_all
from pplug_jax.runtime.slips import near
from pplug_jax.settings import Settings, upgraded
from pplug_jax.storage.files import read_object, write_json
from pplug_jax.storage.workdir import CONFIG

# What the official code (rucliujn/PPlug) does where ours by default does something else, and what
# it does where ours may be set to something else.
PARITY = {
    "data.history_labels": False,
    "data.sort_by_date": False,
    "data.max_history": 512,
    "encoder.query_prefix": "Represent this sentence for searching relevant passages:",
    "encoder.item_prefix": "",
    **dict(PAPER_PLUG),
}

FROM_ONE = (
    "data.max_input_length",
    "data.max_target_length",
    "data.max_history",
    "data.buckets",
    "encoder.max_length",
    "encoder.batch_size",
    "plug.num_persona_tokens",
    "train.batch_size",
    "train.accumulation",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "lora.rank",
    "lora.user_epochs",
    "eval.batch_size",
    "eval.num_beams",
    "eval.max_new_tokens",
    "eval.top_k",
    "eval.bootstrap_samples",
    "mesh.slices",
    "mesh.fsdp",
    "mesh.tensor",
)
FROM_ZERO = ("train.prompt_cache",)
ABOVE_ZERO = ("plug.temperature", "train.epochs", "train.learning_rate", "train.clip_norm")
OF_ALL_METHODS = ("train.prompt_cache", "train.validation")
SHARES = ("plug.history_dropout", "plug.persona_dropout", "train.warmup", "train.validation")
DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {
    "data.on_error": ("stop", "skip"),
    "train.on_divergence": ("stop", "back"),
    "llm.dtype": DTYPES,
    "encoder.dtype": DTYPES,
    "plug.dtype": DTYPES,
    "data.history_numbers": tuple(NUMBERS),
    "llm.quantize": ("", *KINDS),
    "plug.place": ("front", "behind"),
    "encoder.pooling": ("", *POOLINGS),
}


def checked(config: ml_collections.ConfigDict) -> Settings:
    """Return the settings of a config, with what `config.parity` stands for.

    Raises:
        ConfigError: as `check_config`.
    """
    settings = Settings.of(config)
    if settings.parity:
        settings = settings.changed(PARITY)
    check_config(settings)
    return settings


def check_config(config: Settings) -> None:
    """Find what cannot work before anything is loaded.

    Raises:
        ConfigError: names the field.
    """
    if config.task not in TASKS:
        raise ConfigError(
            f"config.task {config.task!r} is unknown{near(config.task, TASKS)}; "
            f"known: {', '.join(TASKS)}"
        )
    _check_ranges(config)
    methods = methods_of(config)
    for name, settings in read_variants(config.variants).items():
        _check_variant(config, methods[name], settings)
    if not config.methods:
        raise ConfigError(f"config.methods is empty; known: {', '.join(methods)}")
    _check_unique(config.methods, "methods")
    if unknown := [name for name in config.methods if name not in methods]:
        raise ConfigError(
            f"config.methods: {unknown[0]!r} is unknown{near(unknown[0], methods)}; "
            f"known: {', '.join(methods)}"
        )
    for name in config.methods:
        weights = methods[name].plug
        if weights is not None and weights not in config.methods:
            raise ConfigError(
                f"config.methods: {name!r} uses what {weights!r} trains, which is missing"
            )
    answers = TASKS[config.task].answers
    if config.data.answer not in ("", *answers):
        raise ConfigError(
            f"config.data.answer {config.data.answer!r}: "
            + (f"known: {', '.join(answers)}" if answers else f"{config.task} has its own")
        )
    if not answers:
        check_answers(config)
    if config.data.sample_eval_users and not config.data.path and config.task != "LaMP_5":
        raise ConfigError(
            f"config.data.path is empty, and the embedded sample has no {config.task}, only LaMP_5"
        )
    if config.tune.learning_rates and not config.train.validation:
        raise ConfigError(
            "config.tune.learning_rates are judged on examples that are held out: "
            "say which share of them, as --config.train.validation=0.1"
        )
    _check_plug(config)


def check_answers(config: Settings) -> None:
    """Check that a history's items can be examples, or show answers, where a method has them do so.

    Raises:
        ConfigError: they cannot; the message says why.
    """
    task = task_of(config)
    for method in asked_for(config):
        own_items = configured(config, method, 0).train.own_items or method.user_lora
        if method.answers and not task.answer:
            uses = "shows what the items of a history answer"
        elif own_items and not task.question:
            uses = "trains on the items of a history"
        else:
            continue
        why = (
            "no field of theirs is known to be like the outputs: name one of "
            f"{', '.join(task.answers[:-1])} with --config.data.answer"
            if task.answers
            else f"those of {task.name} are no examples of it"
        )
        raise ConfigError(f"config.methods: {method.name!r} {uses}, but {why}")


def _check_variant(config: Settings, variant: Method, settings: Changes) -> None:
    """Check a variant of `pplug` with these settings."""
    where, known = f"config.variants: {variant.name!r}", config.flat()
    for field, value in settings:
        if field not in known:
            raise ConfigError(
                f"{where} changes {field!r}, and there is no such setting{near(field, known)}"
            )
        if not field.startswith(("plug.", "train.")):
            raise ConfigError(
                f"{where} changes {field!r}, which no plug's training reads; only settings of "
                "plug and train make another plug"
            )
        if field in OF_ALL_METHODS:
            raise ConfigError(f"{where} changes {field!r}, which is the same for all methods")
        kind = type(known[field])
        accepted = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
            raise ConfigError(f"{where} has {field} = {value!r}, which is no {kind.__name__}")
    try:
        changed = configured(config, variant, 0)
        _check_ranges(changed)
        _check_plug(changed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} cannot be: {error}") from error


def _check_unique(names: Sequence[str], field: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"config.{field}: {twice[0]!r} is named twice")


def _check_plug(config: Settings) -> None:
    """Check what `_check_ranges` does not, of the settings that a plug is trained by."""
    features = config.plug.features
    if unknown := [name for name in features if name not in FEATURES]:
        raise ConfigError(
            f"config.plug.features: {unknown[0]!r} is unknown{near(unknown[0], FEATURES)}; "
            f"known: {', '.join(FEATURES)}"
        )
    _check_unique(features, "plug.features")
    if config.train.batch_size % config.train.accumulation:
        raise ConfigError(
            f"config.train.batch_size {config.train.batch_size} does not divide into "
            f"config.train.accumulation {config.train.accumulation} parts"
        )


def _check_ranges(config: Settings) -> None:
    given = config.flat()
    # Written so that no comparison holds for what is no number.
    wrong = {
        "must be at least 1": [field for field in FROM_ONE if not given[field] >= 1],
        "must be above 0": [field for field in ABOVE_ZERO if not 0 < given[field] < math.inf],
        "must be at least 0": [field for field in FROM_ZERO if not 0 <= given[field] < math.inf],
        "is a share, from 0 to 1": [field for field in SHARES if not 0 <= given[field] <= 1],
    }
    for problem, fields in wrong.items():
        for field in fields:
            raise ConfigError(f"config.{field} {given[field]!r} {problem}")
    for field, known in CHOICES.items():
        if given[field] not in known:
            raise ConfigError(
                f"config.{field} {given[field]!r} is unknown{near(given[field], known)}; "
                f"known: {', '.join(map(repr, known))}"
            )


def check_batches(config: Settings, parts: int) -> None:
    """Check that the mesh, which cuts every batch into `parts`, divides the batch sizes.

    Raises:
        ConfigError: names the field.
    """
    sizes = {
        "train.batch_size / config.train.accumulation": config.train.batch_size
        // config.train.accumulation,
        "eval.batch_size": config.eval.batch_size,
    }
    for field, size in sizes.items():
        if size % parts:
            raise ConfigError(
                f"config.{field}: {size} rows at a time do not divide by the mesh's {parts} parts "
                "(data x fsdp)"
            )


MAY_DIFFER = (
    "data.eval_split",
    "data.history_store",
    "methods",
    "seeds",
    "train.prompt_cache",
    "variants",
)


def claim_workdir(workdir: Path, config: Settings) -> None:
    """Write config.json, or check that the existing one says the same.

    Only these may differ: the mesh, the split to evaluate on, the methods, the seeds, which
    variants exist, where the history store is, and how many prompts are kept.

    Raises:
        ConfigError: the workdir belongs to another config; the message names the fields.
    """
    path = workdir / CONFIG
    if not path.is_file():
        wait_for_all("all have looked for config.json")
        write_json(path, dataclasses.asdict(config))
        wait_for_all("config.json is there")
        return
    saved = Settings.of(upgraded(read_object(path))).flat()
    now = config.flat()
    before, after = (read_variants(settings["variants"]) for settings in (saved, now))
    if changed := [name for name in before.keys() & after.keys() if before[name] != after[name]]:
        raise ConfigError(
            f"{workdir} was made with another variant {min(changed)!r}: give it another name"
        )
    different = sorted(
        field
        for field in now
        if saved[field] != now[field] and not field.startswith("mesh.") and field not in MAY_DIFFER
    )
    if different:
        changes = "; ".join(f"config.{f}: {saved[f]!r} there, {now[f]!r} now" for f in different)
        raise ConfigError(
            f"{workdir} was made with a different config ({changes}): "
            "give another --workdir, or the same settings"
        )
