"""Division of a grid that exceeds memory: passes over the data, and stacks inside a pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from husai.dictionaries.families import FAMILIES
from husai.runs.errors import BadInput
from husai.training.stack import Member

FLOAT = 4  # bytes
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Sizes:
    """Sizes that decide the memory of a run, beside its members."""

    d_in: int
    d_out: int
    rows: int
    """Rows of a batch."""
    snapshots: int
    """Number of decoders that are kept in host memory during training."""


def budget(device: torch.device) -> int:
    """Bytes that training may take: a fixed part of the memory of the device or the container.

    Memory in use is not subtracted, therefore a machine divides a grid in the same way each time.
    """
    if device.type == "cuda":
        return int(0.8 * torch.cuda.get_device_properties(device).total_memory)
    total = psutil.virtual_memory().total
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return int(0.6 * (min(total, int(limit)) if limit.isdigit() else total))


def state_bytes(m: Member, sizes: Sizes, device: torch.device) -> int:
    """Bytes of a member between steps: parameters, gradients and Adam's two moments of both matrices.

    A CPU also holds the snapshots, and copies of all tensors while they are saved or handed over.
    """
    both, decoder = m.d_sae * (sizes.d_in + sizes.d_out), m.d_sae * sizes.d_out
    return FLOAT * (4 * both if device.type == "cuda" else 7 * both + 3 * sizes.snapshots * decoder)


def step_bytes(m: Member, sizes: Sizes) -> int:
    """Upper bound of the additional bytes of a member during a step."""
    family, rows = FAMILIES[m.family], sizes.rows
    matrices = 2 * rows * (sizes.d_in + sizes.d_out)
    if family.PENALISED:
        return FLOAT * (matrices + 8 * rows * m.d_sae)
    dense = 4 * rows * m.d_sae  # AuxK, if all features are dead
    return FLOAT * (matrices + 6 * rows * m.k + dense + (rows * m.d_sae if m.family != "topk" else 0))


def passes(members: list[Member], sizes: Sizes, device: torch.device) -> list[list[int]]:
    """Positions of the members that are trained together, one list a pass over the data.

    Raises:
        BadInput: a member does not fit by itself.
    """
    available = budget(device)
    out: list[list[int]] = [[]]
    used = 0
    for i, m in enumerate(members):
        need = state_bytes(m, sizes, device)
        if need + step_bytes(m, sizes) > available:
            needed = (need + step_bytes(m, sizes)) / 2**30
            raise BadInput(
                f"d_sae {m.d_sae}: one such SAE takes {needed:.0f} GiB to train; {available / 2**30:.0f} GiB available"
            )
        if out[-1] and used + need > available // 2:
            out.append([])
            used = 0
        out[-1].append(i)
        used += need
    return out


def stacks(members: list[Member], sizes: Sizes, device: torch.device) -> list[list[int]]:
    """Positions of the members that take each step together: one architecture and width, within memory."""
    out: list[list[int]] = []
    for kind in dict.fromkeys((m.family, m.d_sae) for m in members):
        same = [i for i, m in enumerate(members) if (m.family, m.d_sae) == kind]
        need = max(step_bytes(members[i], sizes) for i in same)
        size = max(1, budget(device) // 2 // need)
        out += [same[i : i + size] for i in range(0, len(same), size)]
    return out
