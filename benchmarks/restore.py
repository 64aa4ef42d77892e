"""When does converting an LLM pay? `python -m benchmarks.restore`

Times, for random weights in the shape of Llama 3.2 1B, reading the Hugging Face directory against
restoring what `--mode=convert` writes. Files are in the system's cache for both.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app
from etils import epath

from benchmarks.quantize import KINDS, write_random
from pplug_jax.checkpoint import restore_module, save_module
from pplug_jax.llm import abstract_llm, load_llm
from pplug_jax.mesh import make_mesh, place_abstract

REPEATS = 3


def seconds(make: Callable[..., Any], *args: Any, **settings: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(make(*args, **settings))
    return time.perf_counter() - start


def main(_: list[str]) -> None:
    mesh = make_mesh()
    with tempfile.TemporaryDirectory() as scratch:
        directory, saved = Path(scratch) / "hf", epath.Path(scratch) / "orbax"
        directory.mkdir()
        write_random(directory)
        print(f"{'kernels':10}{'load':>8}{'restore':>9}{'ratio':>7}")
        for kind in KINDS:
            settings = {"dtype": "bfloat16", "quantize": kind or None}
            save_module(saved, load_llm(directory, mesh=mesh, **settings), settings)
            abstract = place_abstract(abstract_llm(directory, **settings), mesh)
            pairs = [
                (
                    seconds(load_llm, directory, mesh=mesh, **settings),
                    seconds(restore_module, saved, abstract, settings),
                )
                for _ in range(REPEATS)
            ]
            load, restore = map(statistics.median, zip(*pairs, strict=True))
            print(f"{kind or 'bfloat16':10}{load:7.1f}s{restore:8.1f}s{load / restore:6.1f}x")


if __name__ == "__main__":
    app.run(main)
