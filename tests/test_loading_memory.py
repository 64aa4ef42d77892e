"""What reading a checkpoint of several GiB costs the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.environment import AS_USERS

pytestmark = pytest.mark.slow

GIB = 2**30
LAYERS, HIDDEN, MLP = 10, 2048, 32768
KERNELS = {
    "self_attn.q_proj": (256, HIDDEN),
    "self_attn.k_proj": (256, HIDDEN),
    "self_attn.v_proj": (256, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 256),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
LOAD = """
import os, sys, threading, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
from pplug_jax.llm import load_llm
from pplug_jax.runtime.mesh import make_mesh

def own_bytes():  # without the pages of the file, which the system may drop
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, own_bytes())
        time.sleep(0.005)

mesh = make_mesh(1, 4, 2)
jax.block_until_ready(jax.numpy.ones(8))
before = peak = own_bytes()
threading.Thread(target=watch, daemon=True).start()
llm = jax.block_until_ready(load_llm(sys.argv[1], mesh=mesh))
arrays = sum(s.data.nbytes for x in jax.tree.leaves(llm) for s in x.addressable_shards)
print(arrays, peak - before)
"""


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
def test_loading_takes_the_largest_tensor_and_1_gib(tmp_path: Path) -> None:
    """Eight devices share a model of 3.8 GiB, of which one stack of layers has 1.25 GiB.

    The devices are simulated, so their arrays lie in the host's memory too and are taken off.
    """
    size, largest = write_zeros(tmp_path)
    assert size > 3.5 * GIB
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": AS_USERS},
        capture_output=True,
        text=True,
        check=True,
    )
    arrays, peak = map(int, process.stdout.split())
    print(f"{size=} {largest=} {arrays=} {peak=}")
    assert size <= arrays < 1.01 * size  # only the norms are on every device
    assert peak - arrays <= largest + GIB
