"""Let later starts find what this one compiles."""

import os
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Let JAX keep what it compiles, so that later starts need not compile it again."""
    # JAX_COMPILATION_CACHE_DIR; mypy does not see what JAX defines at run time.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "pplug_jax"))
