"""Does training fit the chips? `python -m benchmarks.fit llama3_8b v5e-8 --quantize=int8`

Compiles a preset's whole training step ahead of time with the real TPU compiler and prints the
memory that it plans for one chip. Needs `pip install libtpu`, but neither a TPU nor any weights.
"""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import tempfile

import jax
import jax.numpy as jnp
import transformers
from absl import app, flags
from flax import nnx
from jax.experimental import topologies

from configs import llms
from pplug_jax.data.batches import Batch
from pplug_jax.embedder import UserEmbedder
from pplug_jax.encoder.bert import Bert, BertConfig
from pplug_jax.llm import abstract_llm
from pplug_jax.mesh import make_mesh, place_abstract, replicated, sharding
from pplug_jax.train import jit_step, make_optimizer

FLAGS = flags.FLAGS
flags.DEFINE_enum("quantize", "", ["", "int8", "int4"], "How the frozen kernels are stored.")
flags.DEFINE_integer("rows", 8, "Rows of a batch on each chip.")
flags.DEFINE_integer("tokens", 0, "Of prompt and answer; 0: as the preset has it.")

ANSWER, QUERY, HISTORY = 64, 512, 512
TOPOLOGIES = {"v5e-1": ("v5e:2x2", 1), "v5e-8": ("v5e:2x4", 8), "v5p-16": ("v5p:2x2x2", 8)}
MEMORY = {"v5e": 16, "v5p": 95}  # GiB of a chip
BGE_BASE = BertConfig(30522, 768, 3072, 12, 12, 512, 2, 1e-12)

# The published shapes, from each checkpoint's config.json.
SHAPES = {
    "gemma3_1b": transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
    "gemma3_4b": transformers.Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
    ),
    "gemma2_9b": transformers.Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
    "llama3_1b": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
    "llama3_8b": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "qwen3_8b": transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "flan_t5_base": transformers.T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    ),
    "flan_t5_xxl": transformers.T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    ),
}


def abstract_batch(rows: int, prompt: int) -> Batch:
    def array(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    return Batch(
        prompt=array(jnp.int32, prompt),
        prompt_mask=array(bool, prompt),
        target=array(jnp.int32, ANSWER),
        target_mask=array(bool, ANSWER),
        query=array(jnp.int32, QUERY),
        query_mask=array(bool, QUERY),
        history=array(jnp.float32, HISTORY, BGE_BASE.hidden_size),
        history_mask=array(bool, HISTORY),
        index=array(jnp.int32),
        weight=array(jnp.float32),
    )


def main(argv: list[str]) -> None:
    _, name, machine = argv
    preset = llms.PRESETS[name]
    topology, count = TOPOLOGIES[machine]
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:count]
    fsdp = getattr(preset, llms.SLICES[machine]) if machine in llms.SLICES else 1
    mesh = make_mesh(-1, fsdp, 1, chips)
    with tempfile.TemporaryDirectory() as directory:
        SHAPES[name].save_pretrained(directory)
        llm = abstract_llm(directory, dtype="bfloat16", quantize=FLAGS.quantize or None)
    llm = place_abstract(llm, mesh)

    def build(encoder: Bert) -> UserEmbedder:
        return UserEmbedder(
            encoder, llm.config.hidden_size, 1.0, dtype="bfloat16", rngs=nnx.Rngs(0)
        )

    plug = jax.eval_shape(build, Bert(BGE_BASE, "cls", nnx.Param, "bfloat16"))
    plug = place_abstract(plug, mesh)
    optimizer = make_optimizer(100, preset.learning_rate, 1e-4, 0.05, 1.0)
    # Adam's moments lie as the parameters do.
    where = {x.shape: x.sharding for x in jax.tree.leaves(plug)} | {(): replicated(mesh)}
    opt_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[x.shape]),
        jax.eval_shape(optimizer.init, plug),
    )
    tokens = FLAGS.tokens or preset.max_input_length + ANSWER + 32  # 32: template and soft tokens
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=sharding(mesh, ("batch", *[None] * (len(x.shape) - 1)), x.shape),
        ),
        abstract_batch(FLAGS.rows * count, tokens - ANSWER),
    )
    step = jit_step(plug, opt_state)
    with jax.set_mesh(mesh):
        lowered = step.lower(
            plug, opt_state, llm, batch, optimizer=optimizer, prefix_length=1, remat=True
        )
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        print(str(error))
        return
    arguments = memory.argument_size_in_bytes / 2**30
    rest = (memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**30
    print(
        f"{name} {FLAGS.quantize or 'bfloat16'} on {machine} (fsdp={fsdp}), "
        f"{FLAGS.rows} x {tokens} tokens a chip: arrays {arguments:.2f} GiB + work {rest:.2f} GiB "
        f"= {arguments + rest:.2f} of {MEMORY[machine[:3]]} GiB"
    )


if __name__ == "__main__":
    app.run(main)
