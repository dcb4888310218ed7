# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk: a script's second run starts without compiling."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def keep() -> None:
    """Keeps all programs compiled from now on, however small.

    They lie in `jaxdistill/` in the user's cache folder, in one part for each kind of
    processor, as a program made for another may not run. The user's own settings come
    first: nothing is changed where JAX has a folder already (JAX_COMPILATION_CACHE_DIR)
    or is told to keep none (JAX_ENABLE_COMPILATION_CACHE=0).
    """
    setting = jax.config.values.get
    enabled = setting("jax_enable_compilation_cache")
    if not enabled or setting("jax_compilation_cache_dir"):
        return
    folder = _caches() / "jaxdistill" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default only what took a second: small students compile in less, many times.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _processor() -> str:
    """A name for what XLA compiles for on a CPU: the architecture and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(
            line for line in lines if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        features = platform.processor()
    features = " ".join(sorted(features.split()))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
