"""From the start of the process to the first training step: `python -m benchmarks.startup`

Starts the default run without and with what an earlier run has compiled and kept, and waits for
the first line of metrics.jsonl. Then loads random weights in the shape of
Llama 3.2 1B in processes of their own, for their peak memory.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks.quantize import KINDS, device_bytes
from benchmarks.timing import in_turn, report
from pplug_jax.scoring.tables import show_table

FLAGS = flags.FLAGS
flags.DEFINE_bool("memory", True, "Measure loading too; it writes 2.5 GB and needs 8 GB of memory.")
FLAGS.set_default("repeats", 3)
LIMIT = 600  # seconds until a start counts as failed
TRAIN = (
    *(sys.executable, "-m", "pplug_jax.main", "--config=configs/lamp5.py", "--mode=train"),
    "--config.methods=('pplug',)",
    "--config.data.sample_train_users=32",
    "--config.data.sample_eval_users=1",
    "--config.train.log_every=1",
)
# Prints its peak memory in kB. The argument is the quantisation; `nothing` loads nothing.
LOAD = """
import resource, sys
import jax
from pplug_jax.llm import load_llm
path, kind = sys.argv[1:]
jax.devices()
llm = None if kind == "nothing" else jax.block_until_ready(load_llm(path, quantize=kind or None))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
MB = 1e6


def first_step(**environment: str) -> None:
    """Returns when a new process has made its first training step, and ends it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as workdir:
        metrics, log = Path(workdir) / "metrics.jsonl", Path(workdir) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*TRAIN, f"--workdir={workdir}"],
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            start = time.monotonic()
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.monotonic() - start > LIMIT:
                    process.kill()
                    raise SystemExit(f"error: no training step\n{log.read_text()}")
                time.sleep(0.01)
            process.kill()
            process.wait()


def peak_bytes(directory: Path, kind: str) -> int:
    command = [sys.executable, "-c", LOAD, str(directory), kind]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return 1024 * int(found.stdout.split()[-1])


def loading() -> list[dict[str, int | str]]:
    """The peak memory of loading each kind of kernels, and of a process that loads nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        code = "from pathlib import Path; from benchmarks.quantize import write_random; import sys"
        write = f"{code}; write_random(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", write, scratch], check=True)
        idle = peak_bytes(directory, "nothing")
        return [
            {
                "kernels": kind or "bfloat16",
                "bytes": device_bytes(directory, kind),
                "idle_bytes": idle,
                "peak_bytes": peak_bytes(directory, kind),
            }
            for kind in KINDS
        ]


def main(_: list[str]) -> None:
    loaded = loading() if FLAGS.memory else []
    if loaded:
        show_table(
            "Host memory of loading a Llama of 1B, MB",
            ("kernels", "weights", "process before", "peak", "over weights"),
            [
                [
                    str(found["kernels"]),
                    *(f"{found[name] / MB:,.0f}" for name in ("bytes", "idle_bytes", "peak_bytes")),
                    f"{(found['peak_bytes'] - found['idle_bytes']) / found['bytes']:.2f}x",
                ]
                for found in loaded
            ],
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        seconds = in_turn(
            {
                "all of it": lambda: first_step(JAX_ENABLE_COMPILATION_CACHE="false"),
                "kept from before": lambda: first_step(XDG_CACHE_HOME=cache),
            }
        )
        written = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    first = next(iter(seconds.values()))
    report(
        "startup",
        "Process start to first training step, default config",
        ("compilation", "seconds", "speed"),
        [[name, f"{took:.1f}", f"{first / took:.2f}x"] for name, took in seconds.items()],
        [{"seconds": seconds, "cache_bytes": written}, *loaded],
    )
    print(f"the cache holds {written / MB:.1f} MB")


if __name__ == "__main__":
    app.run(main)
