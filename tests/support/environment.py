"""Settings that JAX reads when it is imported: import this first."""

import importlib.metadata
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
# PYTHONPATH of the processes that tests start: they have what requirements.txt asks for.
WITHOUT_TORCH = str(ROOT / "tests/support/as_users")
AS_USERS = os.pathsep.join([str(ROOT), WITHOUT_TORCH])
# XLA ends the process at a flag that it does not know, as later ones this.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)
# Eight devices to shard over, and compile time instead of run time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        QUICK_TO_COMPILE,
        "--xla_llvm_disable_expensive_passes=true",
    ]
).strip()
# A program read from the cache may begin several collectives at once on a device, each of which
# holds a thread until all devices have come: with a thread a device, a busy machine stands still.
os.environ["PJRT_NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test, or a process that it starts, has compiled, the others need not.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache/compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
