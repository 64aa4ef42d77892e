"""Loads an LLM from a directory; prints the bytes of its arrays, and those taken at most."""

import sys
import threading
import time

import jax

from pplug_jax.llm import load_llm
from pplug_jax.runtime.mesh import make_mesh


def own_bytes() -> int:
    """Without the pages of the file, which the system may drop."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def watch() -> None:
    global peak
    while True:
        peak = max(peak, own_bytes())
        time.sleep(0.005)


if __name__ == "__main__":
    mesh = make_mesh(1, 4, 2)
    jax.block_until_ready(jax.numpy.ones(8))
    before = peak = own_bytes()
    threading.Thread(target=watch, daemon=True).start()
    llm = jax.block_until_ready(load_llm(sys.argv[1], mesh=mesh))
    arrays = sum(s.data.nbytes for x in jax.tree.leaves(llm) for s in x.addressable_shards)
    print(arrays, peak - before)
