"""How a grid is divided so that it fits into memory: passes over the data, and stacks inside a pass."""

from __future__ import annotations

import psutil
import torch

from husai.dictionaries.families import FAMILIES
from husai.training.stack import Member

FLOAT = 4  # bytes


def budget(device: torch.device) -> int:
    """Bytes that training may take: a part of what the device has, whatever is free of it just now, so that the same
    machine divides a grid in the same way each time."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.get_device_properties(device).total_memory)
    return int(0.6 * psutil.virtual_memory().total)


def state_bytes(m: Member, d_in: int) -> int:
    """Of a member between steps: parameters, gradients and Adam's two moments of both matrices."""
    return 4 * FLOAT * 2 * m.d_sae * d_in


def step_bytes(m: Member, d_in: int, rows: int) -> int:
    """Of a member during a step, at most."""
    family = FAMILIES[m.family]
    matrices = 4 * rows * d_in
    if family.PENALISED:
        return FLOAT * (matrices + 8 * rows * m.d_sae)
    dense = 4 * rows * m.d_sae  # AuxK's, should all features be dead
    return FLOAT * (matrices + 6 * rows * m.k + dense + (rows * m.d_sae if m.family != "topk" else 0))


def passes(members: list[Member], d_in: int, available: int) -> list[list[int]]:
    """Positions of the members that are trained together, one list a pass over the data. A member that alone exceeds
    half the memory gets a pass of its own."""
    out, used = [[]], 0
    for i, m in enumerate(members):
        need = state_bytes(m, d_in)
        if out[-1] and used + need > available // 2:
            out.append([])
            used = 0
        out[-1].append(i)
        used += need
    return out


def stacks(members: list[Member], d_in: int, rows: int, available: int) -> list[list[int]]:
    """Positions of the members that take each step together: of one family and width, and no more of them than fit."""
    out: list[list[int]] = []
    for kind in dict.fromkeys((m.family, m.d_sae) for m in members):
        same = [i for i, m in enumerate(members) if (m.family, m.d_sae) == kind]
        need = max(step_bytes(members[i], d_in, rows) for i in same)
        size = max(1, available // 2 // need)
        out += [same[i : i + size] for i in range(0, len(same), size)]
    return out
