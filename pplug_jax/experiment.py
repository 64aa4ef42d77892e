"""What every mode needs of a config: the mesh, the frozen models, the data and the history store."""

import json
from pathlib import Path

import jax
import ml_collections
from flax import nnx

from pplug_jax import hf
from pplug_jax.data import lamp, sample
from pplug_jax.data.batches import Tokenizer
from pplug_jax.data.history import HistoryStore
from pplug_jax.data.lamp import Example
from pplug_jax.data.tasks import TASKS
from pplug_jax.embedder import UserEmbedder
from pplug_jax.encoder import load_encoder
from pplug_jax.encoder.encode import load_bert
from pplug_jax.llm import load_llm
from pplug_jax.mesh import batch_parts, make_mesh, place
from pplug_jax.methods import METHODS

ASSETS = Path(__file__).parent / "assets"


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field."""


def model_path(path: str, source: str, field: str) -> Path:
    """A model's directory: `assets/NAME` is one bundled with the package, anything else a path.

    Raises:
        ConfigError: nothing is there; the message says what belongs there.
    """
    directory = ASSETS / path.removeprefix("assets/") if path.startswith("assets/") else Path(path)
    if not directory.is_dir():
        raise ConfigError(
            f"config.{field}.path: there is no directory {str(directory)!r}. Put {source or 'a model in Hugging Face format'} there "
            f"(config.json, *.safetensors, tokenizer.json), or name its place with --config.{field}.path=DIR"
        )
    return directory


def check_config(config: ml_collections.ConfigDict) -> None:
    """Finds what cannot work before anything is loaded.

    Raises:
        ConfigError: names the field.
    """
    if config.task not in TASKS:
        raise ConfigError(f"config.task {config.task!r} is unknown; known: {', '.join(TASKS)}")
    if unknown := [name for name in config.methods if name not in METHODS]:
        raise ConfigError(f"config.methods: {unknown[0]!r} is unknown; known: {', '.join(METHODS)}")
    for name in config.methods:
        plug = METHODS[name].plug
        if plug is not None and plug not in config.methods:
            raise ConfigError(
                f"config.methods: {name!r} uses the plug of {plug!r}, which is not listed"
            )
    if config.train.batch_size % config.train.accumulation:
        raise ConfigError(
            f"config.train.batch_size {config.train.batch_size} does not divide into config.train.accumulation {config.train.accumulation} parts"
        )


class Experiment:
    """The loaded parts. `examples` holds the splits of the config by their role: `train` and `eval`."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path):
        check_config(config)
        self.config = config
        self.workdir = workdir
        self.task = TASKS[config.task]
        self.mesh = make_mesh(**config.mesh)
        parts = batch_parts(self.mesh)
        for field, size in (
            ("train.batch_size", config.train.batch_size // config.train.accumulation),
            ("eval.batch_size", config.eval.batch_size),
        ):
            if size % parts:
                raise ConfigError(
                    f"config.{field}: {size} rows at a time do not divide by the mesh's {parts} parts (data x fsdp)"
                )
        llm_path = model_path(config.llm.path, config.llm.source, "llm")
        self.encoder_path = model_path(config.encoder.path, config.encoder.source, "encoder")
        self.examples = {"train": self.read("train"), "eval": self.read("eval")}

        self.llm = load_llm(llm_path, mesh=self.mesh, dtype=config.llm.dtype)
        tokenizer = hf.load_tokenizer(llm_path, self.llm.config.vocab_size)
        self.tokenizer = Tokenizer(tokenizer, config.llm.separator, self.llm.config.eos_ids)
        longest = (
            self.tokenizer.prefix_length
            + 1
            + config.plug.num_persona_tokens
            + len(self.tokenizer.separator)
        )
        longest += config.data.max_input_length + max(
            config.data.max_target_length, config.eval.max_new_tokens
        )
        if longest > self.llm.config.max_length:
            raise ConfigError(
                f"config.data.max_input_length: prompts and answers of up to {longest} tokens exceed the {self.llm.config.max_length} that the LLM was made for"
            )
        self.encoder = load_encoder(
            self.encoder_path,
            mesh=self.mesh,
            dtype=config.encoder.dtype,
            pooling=config.encoder.pooling or None,
            max_length=config.encoder.max_length,
        )
        self.store = HistoryStore(config.data.history_store or workdir / "history", self.encoder)

    def read(self, role: str) -> list[Example]:
        """The examples of `train` or `eval`: LaMP files where `config.data.path` names them, else the embedded sample."""
        data = self.config.data
        split = data.train_split if role == "train" else data.eval_split
        if data.path:
            if not Path(data.path).is_dir():
                raise ConfigError(
                    f"config.data.path: there is no directory {data.path!r} (with {split}_questions.json and {split}_outputs.json)"
                )
            return lamp.read(data.path, split, self.task)
        count = data.sample_train_users if role == "train" else data.sample_eval_users
        return list(sample.users(self.config.seed, split, count))

    def encode_histories(self) -> int:
        """Puts every history text into the store; returns how many were new."""
        texts = (
            self.task.item_text(item)
            for examples in self.examples.values()
            for e in examples
            for item in e.profile
        )
        return self.store.add(texts, self.config.encoder.batch_size)

    def new_plug(self) -> UserEmbedder:
        """An untrained plug on the mesh: Enc_inp from the encoder's weights, the rest drawn from the seed."""
        config = self.config.plug
        encoder = load_bert(
            self.encoder_path,
            self.mesh,
            pooling=self.config.encoder.pooling or None,
            variable=nnx.Param,
            dtype=config.dtype,
        )
        scale = float(jax.jit(lambda llm: llm.embedding_norm())(self.llm))

        @jax.jit
        def build(key: jax.Array) -> UserEmbedder:
            return UserEmbedder(
                encoder,
                self.llm.config.hidden_size,
                scale,
                num_persona_tokens=config.num_persona_tokens,
                temperature=config.temperature,
                learned_temperature=config.learned_temperature,
                dtype=config.dtype,
                rngs=nnx.Rngs(key),
            )

        return place(build(jax.random.key(self.config.seed)), self.mesh)


def parameter_count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(module)))


def claim_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json, or checks that the one there says the same; the mesh may differ.

    Raises:
        ConfigError: the workdir belongs to another config; the message names the fields.
    """
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    if path.is_file():
        theirs = json.loads(path.read_text())
        a, b = flatten(theirs), flatten(ours)
        if different := sorted(
            k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and not k.startswith("mesh.")
        ):
            told = "; ".join(f"config.{k}: {a.get(k)!r} there, {b.get(k)!r} now" for k in different)
            raise ConfigError(
                f"{workdir} was made with a different config ({told}): give another --workdir, or the same settings"
            )
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(ours, indent=2) + "\n")
        partial.rename(path)


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
