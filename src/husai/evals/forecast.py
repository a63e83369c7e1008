"""Forecasts time, memory and disk of trainings, from a few timed steps on this machine."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from husai.activations.language_model import run
from husai.activations.source import LANGUAGE_MODEL_ROWS
from husai.dictionaries.family import Shape
from husai.dictionaries.sae import SAE
from husai.evals.loaded import LoadedSAEs
from husai.evals.random_model import grid_of, trained_alike
from husai.evals.siblings import SiblingPlan
from husai.evals.supplied import RANDOM_MODEL, TRANSCODERS
from husai.evidence.levels import RANDOM_DRAWS
from husai.runs.progress import duration
from husai.stability.recurrence import rotations_for
from husai.training import memory
from husai.training.stack import Member, Stack, StepSettings
from husai.training.trainer import TrainingConfig

TIMED_STEPS = 3
FLOAT = 4
"""Bytes of one number in checkpoints and stores."""


@dataclass(frozen=True)
class Forecast:
    """Time, memory and disk of a run, extrapolated from a few timed steps on this machine."""

    saes: int
    """Number of SAEs to train: siblings, and an SAE of Gaussian rows for each SAE of the comparison."""
    siblings: int
    """Number of siblings among them."""
    tokens: int
    """Number of rows that each SAE sees."""
    rows: int
    """Number of activations to harvest."""
    passes: int
    """Number of passes over the data. More than one are needed if the SAEs do not fit into memory together."""
    harvest_seconds: float
    training_seconds: float
    rotation_seconds: float
    memory_bytes: int
    """Memory of the largest pass."""
    disk_bytes: int
    free_bytes: int

    def lines(self) -> list[str]:
        """The forecast as text."""
        seconds = self.harvest_seconds + self.training_seconds + self.rotation_seconds
        controls = f"{self.saes - self.siblings} controls (SAEs of Gaussian rows)"
        if self.siblings:
            trained = f"{self.siblings} sibling{'s' if self.siblings > 1 else ''} + {controls}"
            rows = f"{self.rows:,} different ones (--train-rows)"
        else:
            trained = f"{controls}; the given SAEs are the siblings, and none is trained"
            rows = "of Gaussian rows with the mean and covariance of the activations"
        return [
            f"to train: {trained}",
            f"{self.tokens:,} tokens each, {rows}; {self.passes} pass{'es' if self.passes > 1 else ''} over the data",
            f"time about {duration(seconds)}: activations {duration(self.harvest_seconds)}, training "
            f"{duration(self.training_seconds)}, rotations {duration(self.rotation_seconds)}",
            f"memory about {self.memory_bytes / 1e9:.1f} GB, disk about {self.disk_bytes / 1e9:.1f} GB "
            f"({self.free_bytes / 1e9:.0f} GB free)",
        ]


def estimate_siblings(
    user_saes: LoadedSAEs,
    plan: SiblingPlan,
    artifact_root: Path,
    device: torch.device,
    siblings: int,
    rotations: int | None = None,
) -> Forecast:
    """Forecast a plan. Times a few training steps, one batch of the model, and one product of two decoders.

    Args:
        siblings: number of SAEs that the SAE is compared with. rotations: see `recurrence.rotations_for`.
    """
    first, n = user_saes.saes[0].sae, len(plan.grid)
    grid, config = (plan.grid, plan.config) if n else trained_alike(user_saes)
    gaussian = max(n, siblings) if n else len(grid)
    times = (n + gaussian) / len(grid)  # trainings of a grid
    rows = (plan.rows or min(LANGUAGE_MODEL_ROWS, config.tokens)) if n else user_saes.store.rows
    rows_to_harvest = rows + (config.tokens if plan.buffer_rows else 0)
    sizes = sizes_of(first, config)
    passes = memory.passes(grid, sizes, device)
    largest = max(sum(memory.state_bytes(grid[i], sizes, device) for i in p) for p in passes)

    checkpoint = FLOAT * first.d_sae * (first.d_in + first.d_out * (1 + sizes.snapshots))
    stores = (2 if n else 1) * FLOAT * rows * first.d_in
    artifact_root.mkdir(parents=True, exist_ok=True)
    return Forecast(
        saes=n + gaussian,
        siblings=n,
        tokens=config.tokens,
        rows=rows_to_harvest,
        passes=math.ceil(times * len(passes)),
        harvest_seconds=rows_to_harvest * _seconds_of_token(user_saes, device) if n else 0.0,
        training_seconds=times * training_seconds(first, grid, config, device),
        rotation_seconds=2
        * siblings
        * (rotations or rotations_for(first.d_sae))
        * _seconds_of_product(first.W_dec, device),
        memory_bytes=largest,
        disk_bytes=stores + (n + gaussian) * checkpoint,
        free_bytes=shutil.disk_usage(artifact_root).free,
    )


def sizes_of(sae: SAE, config: TrainingConfig) -> memory.Sizes:
    """Sizes that the memory of a training like an SAE's depends on."""
    return memory.Sizes(sae.d_in, sae.d_out, config.batch_size, len(config.snapshot_steps()))


def training_seconds(sae: SAE, grid: list[Member], config: TrainingConfig, device: torch.device) -> float:
    """Seconds of one training of a grid of SAEs like this one, from a few timed steps of its first pass."""
    together = memory.passes(grid, sizes_of(sae, config), device)[0]
    step = _seconds_of_step([grid[i] for i in together], config, sae.d_in, device)
    return step * config.steps * len(grid) / len(together)


@dataclass(frozen=True)
class Training:
    """SAEs that one part of a release check trains."""

    part: str
    """Name of the part."""
    what: str
    """Kind of the SAEs."""
    saes: int
    """Number of the SAEs."""
    tokens: int
    """Number of rows that each SAE sees."""
    seconds: float


def estimate_check(tested: LoadedSAEs, parts: set[str], device: torch.device) -> list[Training]:
    """SAEs that a release check of several SAEs trains. Repeats for a missed L0 are not counted.

    Args:
        tested: SAEs with their references and controls. parts: names of the parts that run.
    """

    def measure(grid: list[Member], config: TrainingConfig) -> tuple[int, int, float]:
        return len(grid), config.tokens, training_seconds(tested.saes[0].sae, grid, config, device)

    def train(part: str, what: str, times: int, timed: tuple[int, int, float]) -> Training:
        saes, tokens, seconds = timed
        return Training(part, what, times * saes, tokens, times * seconds)

    alike = measure(*trained_alike(tested))
    trainings = [train("candidate_confirmation", "SAEs of Gaussian rows with the moments of held-out rows", 1, alike)]
    if (stress := {RANDOM_MODEL, TRANSCODERS} & parts) and tested.training_metadata is not None:
        first = RANDOM_MODEL if RANDOM_MODEL in stress else TRANSCODERS  # the other parts share them
        trainings.append(train(first, "SAEs of Gaussian rows with the moments of training rows", 1, alike))
    if RANDOM_MODEL in parts:
        draws, gaussian = len(RANDOM_DRAWS), "SAEs of Gaussian rows of each draw"
        if tested.controls is None:
            trainings.append(train(RANDOM_MODEL, f"SAEs of {draws} draws of random weights", draws, alike))
            trainings.append(train(RANDOM_MODEL, gaussian, draws, alike))
        else:  # by the recipe of the supplied SAEs, of which `controls` holds those of one draw
            supplied = measure(grid_of(tested.controls), tested.controls.recipe)
            trainings.append(train(RANDOM_MODEL, gaussian, draws, supplied))
    if TRANSCODERS in parts:
        trainings += [train(TRANSCODERS, what, 1, alike) for what in ("transcoders", "transcoders of Gaussian rows")]
    return trainings


def _seconds_of_step(members: list[Member], config: TrainingConfig, d_in: int, device: torch.device) -> float:
    """Median seconds of a training step of a stack on Gaussian rows. The first step may compile and does not count."""
    settings = StepSettings(
        config.betas,
        config.weight_decay,
        config.aux_coefficient,
        config.dead_after_tokens,
        config.proposes(device, d_in),
        config.steps,
        config.freeze_decoder,
    )
    shape = Shape(d_in, d_in, members[0].d_sae)
    stack = Stack(members, shape, device, torch.float32, config.tied_init, None)
    x = torch.randn(config.batch_size, d_in, device=device).expand(len(members), -1, -1)
    times = []
    for i in range(TIMED_STEPS + 1):
        began = time.monotonic()
        stack.step(x, x, i, 1.0, settings)
        _wait(device)
        times.append(time.monotonic() - began)
    return sorted(times[1:])[TIMED_STEPS // 2]


def _seconds_of_token(user_saes: LoadedSAEs, device: torch.device) -> float:
    """Seconds of the model up to the hook for one token, from the second of two batches."""
    subject, length = user_saes.subject, min(128, user_saes.subject.n_ctx)
    tokens = torch.randint(len(subject.tokenizer), (4, length)).numpy()
    for _ in range(2):
        began = time.monotonic()
        run(subject, [*tokens], [user_saes.hook_name])
        _wait(device)
    return (time.monotonic() - began) / tokens.size


def _seconds_of_product(W_dec: torch.Tensor, device: torch.device) -> float:
    """Seconds for all cosines of two decoders, extrapolated from a part of one decoder."""
    W = W_dec.to(device)
    part = W[: min(1024, len(W))]
    for _ in range(2):
        began = time.monotonic()
        (part @ W.T).amax(1)
        _wait(device)
    return (time.monotonic() - began) * len(W) / len(part)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
