"""One part of the measurements: `python -m benchmarks.accelerator PART --out=DIR --seconds=N`."""

import argparse
import importlib
import os
from pathlib import Path

PARTS = ("train", "generate", "encode", "compare", "attention", "profile")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of PART.json")
    parser.add_argument("--seconds", type=float, required=True, help="it ends after so many")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, for a CPU")
    given = parser.parse_args()

    # Before JAX is imported. It would take three quarters of the card, and PyTorch finds no room.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # What one part has compiled, the next need not: where the command keeps it too.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/pplug_jax"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    import transformers

    from benchmarks.accelerator.record import Record
    from benchmarks.accelerator.table import tables

    torch.set_float32_matmul_precision("high")  # as JAX multiplies float32 on such cards
    if given.rehearse:  # beside other work PyTorch's threads wait for one another
        torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    record = Record(given.out / f"{given.part}.json", given.part, given.seconds)
    record.guard()
    importlib.import_module(f"benchmarks.accelerator.{given.part}").run(record, given.rehearse)
    record.finish()
    print(tables([record.content]))


if __name__ == "__main__":
    main()
