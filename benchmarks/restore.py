"""When does converting an LLM pay? `python -m benchmarks.restore`

Times, for random weights in the shape of Llama 3.2 1B, reading the Hugging Face directory against
restoring what `--mode=convert` writes. Files are in the system's cache for both.
"""

import functools
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
from pplug_jax.llm import abstract_llm, load_llm
from pplug_jax.runtime.mesh import make_mesh, place_abstract
from pplug_jax.storage.checkpoint import module_loader, save_module

REPEATS = 3


def seconds(make: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(make())
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
            load = functools.partial(load_llm, directory, mesh=mesh, **settings)
            save_module(saved, load(), settings)
            abstract = place_abstract(abstract_llm(directory, **settings), mesh)
            restore = module_loader(saved, abstract, settings)
            pairs = [(seconds(load), seconds(restore)) for _ in range(REPEATS)]
            loaded, restored = map(statistics.median, zip(*pairs, strict=True))
            print(f"{kind or 'bfloat16':10}{loaded:7.1f}s{restored:8.1f}s{loaded / restored:6.1f}x")


if __name__ == "__main__":
    app.run(main)
