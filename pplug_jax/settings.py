"""The settings of a run, with the defaults of all tasks: the paper's where it states them.

`configs/common.py` makes the config of them that a task's config changes; `Settings.of` makes the
settings of a config once, and each room takes its own part.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Self

import ml_collections

from pplug_jax.errors import ConfigError
from pplug_jax.runtime.slips import near

BASE_URL = "https://ciir.cs.umass.edu/downloads/LaMP"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What is read, and how much of it."""

    path: str = ""  # the task's files; empty: the embedded sample, or data/[time/]TASK
    time_based: bool = True  # LaMP split by time, the paper's setting; False: by user
    base_url: str = BASE_URL  # where --mode=download gets LaMP's files
    on_error: str = "stop"  # at a bad record; skip: list it in WORKDIR/bad_records.jsonl
    # Name of the split to train on, as in the files; train[:300] is its first 300 records.
    train_split: str = "train"
    eval_split: str = "dev"  # name of the split to answer
    sample_train_users: int = 0  # users of the embedded sample to train on
    sample_eval_users: int = 0  # users of the embedded sample to answer for
    max_input_length: int = 256  # the LLM's tokens of the input, demonstrations included
    max_target_length: int = 128  # the LLM's tokens of the output
    max_history: int = 512  # newest items of a profile that are read
    sort_by_date: bool = True  # order profiles by date, where all their items have one
    history_labels: bool = True  # read a history item with its tag or score, where it has one
    # Of `custom`, the field of an item that is what the output is: title, label or text; empty: the
    # title, where all items have one and the outputs are as short.
    answer: str = ""
    instruction: str = ""  # of `custom`, what every input begins with; empty: as the data say
    buckets: int = 6  # padded lengths of texts; more pad less, and compile more programs
    # Directory for the history's vectors, also gs://; empty: WORKDIR/history, or history/ where the
    # workdir is gs://...
    history_store: str = ""
    history_numbers: str = "float16"  # what they are kept in; int8 halves the store


@dataclasses.dataclass(frozen=True)
class LLMSettings:
    """The frozen LLM."""

    path: str = ""  # directory, URL (gs://...), hub id or .gguf file; assets/NAME is bundled
    dtype: str = "bfloat16"  # of weights and computation
    quantize: str = ""  # store the frozen kernels as int8 or int4
    converted: str = ""  # where --mode=convert writes the LLM, also gs://; empty: WORKDIR/llm
    chat: bool = False  # use the tokenizer's chat template
    separator: str = "\n"  # between input and answer, without a chat template


@dataclasses.dataclass(frozen=True)
class EncoderSettings:
    """The encoder of history texts, and of inputs."""

    path: str = ""  # directory, URL or hub id of a BERT-style encoder
    pooling: str = ""  # cls or mean; empty: as the encoder's directory says
    # In front of every input, such as "query: " for E5; None: as the encoder's directory says.
    query_prefix: str | None = None
    # In front of every history text, such as "passage: " for E5; None: as the directory says.
    item_prefix: str | None = None
    max_length: int = 512  # tokens of a text that are read
    dtype: str = "float32"  # of the history encoder
    batch_size: int = 64  # history texts encoded at a time


@dataclasses.dataclass(frozen=True)
class PlugSettings:
    """The paper's plug, and its history dropout in the official code's data."""

    # Where the soft tokens stand: `front` of the input, as in the paper, or `behind` it. Behind, a
    # decoder-only LLM has less to do, for what it makes of the input depends on no user.
    place: str = "front"
    num_persona_tokens: int = 1  # k; 1 is the paper
    projector_size: int = 0  # the persona projector's hidden units; 0: the LLM's width, the paper
    temperature: float = 1.0  # of the attention over the history; 1 is the paper
    learned_temperature: bool = False  # train the temperature from there
    recency: bool = False  # learn to weigh older items less, in profiles with dates
    # k more tokens for each feature: `form`, how the user writes (capitals, punctuation, length);
    # `difference`, how the items differ from other users' items on similar topics.
    features: tuple[str, ...] = ()
    # The input encoder's learning rate over the others'; 1 is the paper, 0 freezes it.
    encoder_rate: float = 1.0
    history_dropout: float = 0.5  # largest share of a history that training leaves out
    # Share of training examples that are as a new user's: they show nothing of the user, and train
    # the null persona.
    persona_dropout: float = 0.0
    dtype: str = "float32"  # of the computation; parameters are always float32


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How weights are trained."""

    batch_size: int = 64  # examples a step
    accumulation: int = 1  # parts that a batch is split into, to save memory
    # The paper's 2, over its 11 copies of the data with different history dropout.
    epochs: float = 22.0
    learning_rate: float = 1e-4  # of AdamW, after warm-up
    weight_decay: float = 1e-4  # of AdamW
    warmup: float = 0.05  # share of the steps
    clip_norm: float = 1.0  # largest norm of the gradient
    own_items: int = 0  # number of each user's history items that become examples too
    remat: bool = False  # recompute the LLM's activations in the backward pass, to save memory
    # GB of host memory for the keys and values of prompts in front of soft tokens (plug.place
    # "behind"), so that no epoch, method or seed reads them again; for a job of one process, and
    # batches in one part.
    prompt_cache: float = 0.0
    # At a loss far above where it began and the LLM's own: `stop`, or go `back` to the last
    # checkpoint and end the method's training with it.
    on_divergence: str = "stop"
    log_every: int = 20  # steps
    checkpoint_every: int = 200  # steps
    keep: int = 2  # newest checkpoints
    # Share of the training users that are held out: the checkpoint with the lowest loss on them is
    # used. 0: the last checkpoint is.
    validation: float = 0.0


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The LoRAs of `task_lora` and `user_lora`."""

    rank: int = 8  # of task_lora and user_lora
    alpha: float = 16.0  # the update is alpha / rank * A B
    user_epochs: int = 2  # of user_lora, over a user's own items
    user_learning_rate: float = 1e-4  # of user_lora


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """What is tried before --mode=compare."""

    # Learning rates tried for every trained method and judged by train.validation; empty: only
    # train.learning_rate.
    learning_rates: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """How examples are answered and judged."""

    batch_size: int = 64  # examples answered at a time
    num_beams: int = 4  # beams; 1 is greedy
    length_penalty: float = 1.0  # of beam search
    max_new_tokens: int = 128  # longest answer
    top_k: int = 4  # demonstrations of the retrieval methods
    bootstrap_samples: int = 2000  # for intervals and p-values

    @property
    def decoding(self) -> dict[str, Any]:
        """The settings of `llm.generate.generate`."""
        names = ("max_new_tokens", "num_beams", "length_penalty")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How devices are arranged."""

    slices: int = 1  # TPU slices, or pods, that work together
    data: int = -1  # devices that split the batch; -1: what the other axes leave
    fsdp: int = 1  # devices that split the batch and the weights
    tensor: int = 1  # devices that split every layer


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    seed: int = 0  # of a single run
    seeds: tuple[int, ...] = (0, 1, 2)  # of --mode=compare; `seed` still draws the embedded sample
    # Plugs with other settings, under names for `methods`:
    # "{'k16': {'plug.num_persona_tokens': 16}}".
    variants: str = ""
    task: str = ""  # a row of data/tasks.py
    parity: bool = False  # do as the official code does where we do otherwise: docs/notes/parity.md
    # Methods to run, rows of methods/table.py, or names of `variants`.
    methods: tuple[str, ...] = (
        "none",
        "bm25",
        "recency",
        "pplug",
        "instruction_only",
        "shuffled_user",
        "mean_persona",
    )
    data: DataSettings = DataSettings()
    llm: LLMSettings = LLMSettings()
    encoder: EncoderSettings = EncoderSettings()
    plug: PlugSettings = PlugSettings()
    train: TrainSettings = TrainSettings()
    lora: LoraSettings = LoraSettings()
    tune: TuneSettings = TuneSettings()
    eval: EvalSettings = EvalSettings()
    mesh: MeshSettings = MeshSettings()

    @classmethod
    def of(cls, config: Mapping[str, Any] | ml_collections.ConfigDict) -> Self:
        """Make the settings of a config, or of config.json's content; what it lacks is the default.

        Raises:
            ConfigError: there is no such setting.
        """
        return _of(cls, config)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return the settings with other values, as {"plug.temperature": 0.3}.

        Raises:
            ConfigError: there is no such setting.
            TypeError: a value is of another type than the setting's.
        """
        config = self.config()
        config.update_from_flattened_dict(changes)
        return self.of(config)

    def config(self) -> ml_collections.ConfigDict:
        """Return the settings as a config, whose fields keep their types."""
        config = ml_collections.ConfigDict(dataclasses.asdict(self))
        for name in ("query_prefix", "item_prefix"):  # may be None
            value = getattr(self.encoder, name)
            config.encoder[name] = ml_collections.FieldReference(value, field_type=str)
        return config

    def flat(self) -> dict[str, Any]:
        """Return the values under the names that `changed` takes."""
        return flatten(dataclasses.asdict(self))


def _of(kind: type[Any], values: Any, prefix: str = "config.") -> Any:
    types = typing.get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"{prefix}{name}: there is no such setting{near(name, types)}")
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, Mapping | ml_collections.ConfigDict):
                raise ConfigError(f"{prefix}{name}: expected a group of settings, not {value!r}")
            value = _of(types[name], value, f"{prefix}{name}.")
        made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Return an older config.json's content in today's form.

    Features had a setting each.

    Raises:
        ConfigError: it has a setting that is gone.
    """
    plug = dict(config.get("plug", {}))
    if "features" in plug or "form" not in plug:
        return config
    if plug.pop("heads", 0):
        raise ConfigError("config.plug.heads is gone; this workdir was made by an older version")
    plug["features"] = [name for name in ("difference", "form") if plug.pop(name)]
    return config | {"plug": plug}
