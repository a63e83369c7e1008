"""Facts of the machine for benchmarks, and settings of it for long runs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's on macOS, which cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name and how many of its cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{names[0] if names else 'unknown CPU'}, {len(names) or '?'} cores ({', '.join(fast) or 'no vector flags'})"


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, in place of giving them back to the system each time.

    A training step on a CPU frees and takes the same hundreds of megabytes again and again, and spends a third of its
    time on the pages. Has an effect with glibc only.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
