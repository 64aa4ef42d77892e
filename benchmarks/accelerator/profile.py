"""Part 6: where the time of a training step and of decoding goes, kernel by kernel.

A few calls are traced. `busy_seconds` is the time in which the card works on a kernel; what it is
short of `seconds` the card waits for the host. Kernels are named with the XLA instruction that they
belong to, and summed up by kind.
"""

import collections
import functools
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerator import generate, train
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.shapes import RandomModels, free
from pplug_jax.llm.generate import generate as decode

CALLS = 2
SHOWN = 25  # kernels
# The first that a kernel's name or instruction matches; cuBLAS' are named after the chip's units.
KINDS = {
    "attention by cuDNN": r"cudnn|fmha|flash",
    "products": r"gemm|cublas|cutlass|xmma|nvjet|matmul|dot",
    "copies": r"memcpy|memset|copy|transpose|concatenate",
    "reductions": r"reduce|softmax",
    "sorting": r"sort|topk|top_k",
    "elementwise": r"fusion|loop|select|add|multiply|convert|broadcast",
}


def kind_of(name: str) -> str:
    found = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(found, "other")


def kernels(folder: Path) -> collections.Counter[tuple[str, str]]:
    """(kernel, instruction) -> nanoseconds, of all that the device ran."""
    total: collections.Counter[tuple[str, str]] = collections.Counter()
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            on_device = plane.name.startswith("/device:")
            for line in plane.lines:
                # A device's other lines tell the same by step and by module.
                if on_device and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    if on_device or "hlo_op" in stats:  # on a CPU the host's lines have them
                        total[event.name, str(stats.get("hlo_op", ""))] += int(event.duration_ns)
    return total


def profiled(record: Record, name: str, call: Callable[[], Any]) -> None:
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            for _ in range(CALLS):
                jax.block_until_ready(call())
            seconds = time.perf_counter() - start
        total = kernels(Path(folder))
    kinds: collections.Counter[str] = collections.Counter()
    for (kernel, instruction), spent in total.items():
        kinds[kind_of(f"{kernel} {instruction}")] += spent
    record.note(
        name,
        seconds=seconds,
        calls=CALLS,
        busy_seconds=sum(total.values()) / 1e9,
        kinds={kind: spent / 1e9 for kind, spent in kinds.most_common()},
        kernels=[
            {"kernel": kernel[:120], "instruction": instruction, "seconds": spent / 1e9}
            for (kernel, instruction), spent in total.most_common(SHOWN)
        ],
    )


def run(record: Record, rehearse: bool) -> None:
    for case in train.TINY[:1] if rehearse else train.REAL[:2]:

        def step(case: train.Case = case) -> None:
            models = RandomModels(case.llm, case.encoder, case.dtype, {})
            work = train.Work(models, case.most_rows)
            name = f"training step, {case.llm}, {work.rows} rows"
            profiled(record, name, train.Step(models, work, case.remat))

        record.attempt(f"training step, {case.llm}", step, case.needs)
        free()
    prompts = (generate.TINY if rehearse else generate.REAL)[0]

    def decoding() -> None:
        models = RandomModels(prompts.llm, prompts.encoder, prompts.dtype, {})
        for count, beams in prompts.batches[:2]:
            embeds, mask = generate.draw_prompts(models, count)
            settings = {"max_new_tokens": prompts.new_tokens, "num_beams": beams}
            call = functools.partial(decode, models.llm, embeds, mask, **settings)
            profiled(record, f"decoding, {prompts.llm}, {count} prompts, {beams} beams", call)

    record.attempt(f"decoding, {prompts.llm}", decoding, prompts.needs)
