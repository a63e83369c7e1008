"""Tasks for test_executor.py, in a module of their own: a worker imports them by name."""

import logging
import os
import signal
import time
from pathlib import Path

import torch

from husai.activations.store import ActivationStore
from husai.runs.cells import Cells
from husai.runs.errors import BadInput
from husai.training.grid import members, train_or_find
from husai.training.trainer import TrainingConfig


def train(folder: str, store: str, k: int) -> dict:
    """Three SAEs as one stack, into the cells of `folder`."""
    grid = members([1, 2, 3], [32], [k], [3e-3])
    config = TrainingConfig(tokens=20_000, batch_size=128)
    cells, activations = Cells(Path(folder) / "cells"), ActivationStore.open(Path(store))
    return train_or_find(cells, activations, grid, config, torch.device("cpu"), torch.get_num_threads()).to_json()


def threads() -> dict:
    logging.getLogger("husai").warning("a word from the task")
    return {"torch": torch.get_num_threads(), "here": str(Path().resolve())}


def fail(message: str) -> None:
    raise RuntimeError(message)


def refuse(message: str) -> None:
    raise BadInput(message)


def not_json() -> float:
    return float("nan")


def die(marker: str, times: int) -> str:
    """End this process, `times` attempts long."""
    with open(marker, "a") as f:
        f.write(".")
    if os.path.getsize(marker) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def write_once(path: str) -> str:
    """Write `path`, and then take long, unless it was there."""
    if not os.path.exists(path):
        Path(path).write_text("finished")
        for _ in range(6000):
            time.sleep(0.1)
    return Path(path).read_text()
