"""What reading a checkpoint of GiBs costs the host."""

import json
import os
from pathlib import Path

import pytest

from tests.support.forks import Fork

pytestmark = pytest.mark.slow

MIB = 2**20
LAYERS, HIDDEN, MLP = 10, 2048, 16384
KERNELS = {
    "self_attn.q_proj": (256, HIDDEN),
    "self_attn.k_proj": (256, HIDDEN),
    "self_attn.v_proj": (256, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 256),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


def write_zeros(path: Path) -> tuple[int, int]:
    """A Llama whose weights are a hole in a file; returns the bytes of all and of the largest."""
    shapes = {"model.embed_tokens.weight": (256, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        for name, shape in KERNELS.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (HIDDEN,)
    header, end, largest = {}, 0, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        largest = max(largest, end - start)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return end, largest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_less_than_a_stack_of_layers(tmp_path: Path) -> None:
    """Eight devices share a model of 1.9 GiB, of which one stack of layers has 640 MiB.

    The devices are simulated, so their arrays lie in the host's memory too and are taken off.
    """
    size, largest = write_zeros(tmp_path)
    assert size > 1900 * MIB
    eight = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    process = Fork("tests.support.loading", str(tmp_path), env=eight)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    arrays, peak = map(int, out.split())
    print(f"{size=} {largest=} {arrays=} {peak=}")
    assert size <= arrays < 1.01 * size  # only the norms are on every device
    assert peak - arrays <= largest + 512 * MIB
