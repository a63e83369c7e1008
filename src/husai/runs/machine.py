"""Facts of the machine, and settings for long runs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def usable_cores() -> int:
    """Number of cores that this process may use. On macOS this number is unknown, and all cores count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Name of the processor, its number of cores, and its vector extensions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{names[0] if names else 'unknown CPU'}, {len(names) or '?'} cores ({', '.join(fast) or 'no vector flags'})"


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of returning them to the system.

    Each training step on a CPU frees and allocates the same hundreds of megabytes, and would spend a third of its time
    on page faults. Only glibc is affected.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
