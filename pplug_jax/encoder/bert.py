"""BERT as a sentence encoder: the last layer's CLS or mean vector, L2-normalised."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pplug_jax.errors import InputError
from pplug_jax.nn.attention import attend
from pplug_jax.nn.remat import checkpointed
from pplug_jax.runtime.mesh import rows
from pplug_jax.storage.hf import Source

POOLINGS = ("cls", "mean")

SOURCES = {
    "word_embedding": Source("embeddings.word_embeddings.weight"),
    "position_embedding": Source("embeddings.position_embeddings.weight"),
    "type_embedding": Source("embeddings.token_type_embeddings.weight"),
    "norm_scale": Source("embeddings.LayerNorm.weight"),
    "norm_bias": Source("embeddings.LayerNorm.bias"),
} | {
    f"layers.{ours}{suffix}": Source(f"encoder.layer.{{}}.{theirs}.{kind}", transpose)
    for ours, theirs in {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp_norm": "output.LayerNorm",
    }.items()
    for suffix, kind, transpose in (
        ("_scale" if ours.endswith("norm") else "", "weight", not ours.endswith("norm")),
        ("_bias", "bias", False),
    )
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_length: int
    num_types: int
    norm_eps: float


def config_from_hf(hf: dict[str, Any]) -> BertConfig:
    """Return a BERT config.json as our config.

    Raises:
        InputError: another architecture, or a setting that this code does not implement.
    """
    if hf.get("model_type") != "bert":
        raise InputError(
            f"config.json: model_type {hf.get('model_type')!r} is not supported as an encoder; "
            "supported: bert"
        )
    for field, value in {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
    }.items():
        if hf.get(field, value) != value:
            raise InputError(
                f"config.json: {field}={hf[field]!r} is not supported for model_type bert "
                f"(only {value!r})"
            )
    return BertConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        max_length=hf["max_position_embeddings"],
        num_types=hf["type_vocab_size"],
        norm_eps=hf.get("layer_norm_eps", 1e-12),
    )


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale + bias).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Return x (1 + erf(x / sqrt 2)) / 2, in float32 as PyTorch does.

    `jax.nn.gelu` uses erfc, which takes a CPU twice as long.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Layers(nnx.Module):
    """All layers, stacked on axis 0; inside `lax.scan` the same object is one layer."""

    def __init__(self, config: BertConfig, weight: Any):
        layers = (config.num_layers, "layers")
        embed, mlp = (config.hidden_size, "embed"), (config.intermediate_size, "mlp")
        heads = (config.hidden_size, "heads")
        for name, dims in {
            "query": (embed, heads),
            "key": (embed, heads),
            "value": (embed, heads),
            "output": (heads, embed),
            "up": (embed, mlp),
            "down": (mlp, embed),
        }.items():
            setattr(self, name, weight(layers, *dims))
            setattr(self, f"{name}_bias", weight(layers, (dims[-1][0], "bias")))
        for name in ("attention_norm", "mlp_norm"):
            setattr(self, f"{name}_scale", weight(layers, (config.hidden_size, "norm")))
            setattr(self, f"{name}_bias", weight(layers, (config.hidden_size, "bias")))
        self.config = config

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Run the layer: x (B, L, E), mask (B, 1, L) bool -> (B, L, E)."""
        dtype = x.dtype

        def dense(x: jax.Array, name: str) -> jax.Array:
            return x @ getattr(self, name)[...].astype(dtype) + getattr(self, f"{name}_bias")[
                ...
            ].astype(dtype)

        def norm(x: jax.Array, name: str) -> jax.Array:
            scale, bias = (getattr(self, f"{name}_{part}")[...] for part in ("scale", "bias"))
            return layer_norm(x, scale, bias, self.config.norm_eps)

        def heads(name: str) -> jax.Array:
            return dense(x, name).reshape(*x.shape[:2], self.config.num_heads, -1)

        h = attend(heads("query"), heads("key"), heads("value"), mask)
        x = x + dense(h.reshape(x.shape), "output")
        x = norm(x, "attention_norm")
        h = gelu(dense(x, "up"))
        return norm(x + dense(h, "down"), "mlp_norm")


class Bert(nnx.Module):
    """The encoder, built abstract; `hf.weights_loader` fills it.

    Args:
        config: its shapes.
        pooling: `cls` or `mean`.
        variable: `nnx.Param` for the trained input encoder, `Frozen` for the history encoder.
        dtype: of the computation; the weights keep the dtype that they are loaded with.
    """

    def __init__(
        self, config: BertConfig, pooling: str, variable: type[nnx.Variable], dtype: str = "float32"
    ):
        def weight(*dims: tuple[int, str]) -> nnx.Variable:
            shape, axes = zip(*dims, strict=True)
            return variable(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)

        if pooling not in POOLINGS:
            raise InputError(
                f"pooling {pooling!r} is not supported; supported: {', '.join(POOLINGS)}"
            )
        embed = (config.hidden_size, "embed")
        self.word_embedding = weight((config.vocab_size, "vocab"), embed)
        self.position_embedding = weight((config.max_length, "position"), embed)
        self.type_embedding = weight((config.num_types, "type"), embed)
        self.norm_scale = weight((config.hidden_size, "norm"))
        self.norm_bias = weight((config.hidden_size, "bias"))
        self.layers = Layers(config, weight)
        self.config = config
        self.pooling = pooling
        self.dtype = dtype

    def hidden(self, tokens: jax.Array, mask: jax.Array, remat: bool = False) -> jax.Array:
        """Return the last hidden states: (B, L) int32, (B, L) bool -> (B, L, E)."""

        def layer(x: jax.Array, weights: Layers) -> tuple[jax.Array, None]:
            return weights(rows(x), mask[:, None]), None

        x = jnp.take(self.word_embedding[...], tokens, axis=0)
        x = x + self.position_embedding[: tokens.shape[1]] + self.type_embedding[0]
        x = layer_norm(x, self.norm_scale[...], self.norm_bias[...], self.config.norm_eps).astype(
            self.dtype
        )
        x, _ = jax.lax.scan(checkpointed(layer, remat), x, self.layers)
        return x

    def __call__(self, tokens: jax.Array, mask: jax.Array, remat: bool = False) -> jax.Array:
        """Return float32 vectors of unit L2 norm, (B, E).

        Args:
            tokens: (B, L) int32, right-padded.
            mask: (B, L) bool.
            remat: recompute the layers' activations in the backward pass.
        """
        x = self.hidden(tokens, mask, remat).astype(jnp.float32)
        if self.pooling == "cls":
            x = x[:, 0]
        else:
            x = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1) / jnp.maximum(
                jnp.sum(mask, axis=1, keepdims=True), 1
            )
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
