"""The stacked trainer: many SAEs in one pass over the same activations.

Members of one width form a stack whose parameters share a leading axis and one batched step. Members differ in seed,
k, learning rate and width; those that share a data order share the batches. A stacked run equals separate runs.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from husai.activations.order import BatchReader
from husai.activations.store import ActivationStore
from husai.dictionaries import topk
from husai.dictionaries.checkpoints import SAE
from husai.runs.errors import BadInput
from husai.runs.files import digest, write_bytes
from husai.runs.progress import progress
from husai.runs.seeds import generator

log = logging.getLogger("husai")


@dataclass(frozen=True)
class Member:
    """One SAE of a stack."""

    seed: int
    """Of the initialisation."""
    d_sae: int
    k: int
    learning_rate: float
    order_seed: int
    """Of the data order: a stream of its own, so that either can be varied alone."""


@dataclass(frozen=True)
class TrainingConfig:
    """What all members of a run share."""

    tokens: int = 1_000_000
    """Rows that each member sees, met exactly."""
    batch_size: int = 1024
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    """The learning rate falls linearly to zero over this last share of the steps."""
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int = 50_000
    """A feature that has not fired for this many rows counts as dead and is trained by AuxK."""
    heldout_fraction: float = 0.2
    b_dec_init: str = "geometric_median"
    """Or "mean"; of a sample of the training rows."""
    snapshots: int = 8
    """Decoders kept along the way, at steps spaced geometrically, the untrained and the final one included."""
    curve_points: int = 100
    window_rows: int = 65_536
    betas: tuple[float, float] = (0.9, 0.999)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_size)

    def snapshot_steps(self) -> list[int]:
        """0, then geometrically spaced, then the last step."""
        inner = {round(self.steps ** (i / (self.snapshots - 1))) for i in range(1, self.snapshots)}
        return [0, *sorted(inner)]

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to zero."""
        warmup, decay = self.warmup_fraction * self.steps, self.decay_fraction * self.steps
        return min(1.0, (step + 1) / max(1.0, warmup), (self.steps - step) / max(1.0, decay))


@dataclass
class Trained:
    """What training gives one member."""

    member: Member
    sae: SAE
    decoders: Tensor  # [snapshots, d_sae, d_in], unit rows
    curve: list[float]  # ‖x − x̂‖² / variance on the batch at `curve_steps`
    aux_steps: int  # steps on which the member had dead features


class Stack:
    """Members of one width: parameters, Adam moments and dead-feature counters, all `[n, …]`."""

    def __init__(
        self,
        members: list[int],
        config: list[Member],
        d_in: int,
        b_dec: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.members = members  # positions in the run's list of members
        self.d_sae = config[0].d_sae
        generators = [generator(m.seed, "init", m.d_sae) for m in config]
        params = topk.init(d_in, self.d_sae, b_dec, generators)
        self.params = {name: p.to(device, dtype).requires_grad_() for name, p in params.items()}
        self.k = torch.tensor([m.k for m in config], device=device)
        self.learning_rate = torch.tensor([m.learning_rate for m in config], device=device)
        self.moments = {
            f"{moment}.{name}": torch.zeros_like(p) for name, p in self.params.items() for moment in ("m", "v")
        }
        self.silent = torch.zeros(len(members), self.d_sae, dtype=torch.long, device=device)  # rows since it fired
        self.aux_steps = torch.zeros(len(members), dtype=torch.long, device=device)
        self.snapshots: list[Tensor] = []

    def step(self, x: Tensor, variance: float, config: TrainingConfig, step: int) -> Tensor:
        """One step on `x [n, rows, d_in]`; returns the main loss `[n]`."""
        dead = self.silent > config.dead_after_tokens
        k_aux = max(1, x.shape[-1] // 2)
        total, main, fired = topk.loss(self.params, x, self.k, dead, variance, k_aux, config.aux_coefficient)
        total.sum().backward()
        self._adam(step, config)
        self.silent = (self.silent + x.shape[1]).masked_fill(fired, 0)
        self.aux_steps += dead.any(1)
        return main

    @torch.no_grad()
    def _adam(self, step: int, config: TrainingConfig) -> None:
        """Adam (Kingma & Ba, arXiv 1412.6980), a learning rate a member; decoder rows stay on the unit sphere."""
        beta1, beta2 = config.betas
        correction1, correction2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        W_dec = self.params["W_dec"]
        parallel = (W_dec.grad * W_dec).sum(-1, keepdim=True)
        W_dec.grad.addcmul_(W_dec, parallel, value=-1)  # only the part that turns the row, not the one that scales it
        rate = self.learning_rate * config.learning_rate_factor(step)
        for name, p in self.params.items():
            m, v = self.moments[f"m.{name}"], self.moments[f"v.{name}"]
            m.lerp_(p.grad, 1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            update = (m / correction1).div_((v / correction2).sqrt_().add_(1e-8))
            p.sub_(update.mul_(rate.view(-1, *[1] * (p.ndim - 1))))
            p.grad = None
        W_dec.div_(W_dec.norm(dim=-1, keepdim=True))

    def state(self) -> dict[str, Tensor]:
        tensors = {**self.params, **self.moments, "silent": self.silent, "aux_steps": self.aux_steps}
        return {name: t.detach() for name, t in tensors.items()} | {"snapshots": torch.stack(self.snapshots)}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in {**self.params, **self.moments}.items():
            tensor.copy_(state[name])
        self.silent.copy_(state["silent"])
        self.aux_steps.copy_(state["aux_steps"])
        self.snapshots = list(state["snapshots"])

    def snapshot(self) -> None:
        self.snapshots.append(self.params["W_dec"].detach().clone().cpu())


def geometric_median(x: Tensor, iterations: int = 100) -> Tensor:
    """Weiszfeld's algorithm on `x [rows, d_in]`."""
    median = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - median).norm(dim=1).clamp_min(1e-12)
        new = (x * weight.unsqueeze(1)).sum(0) / weight.sum()
        if (new - median).norm() <= 1e-7 * median.norm():
            break
        median = new
    return new


def check_members(members: list[Member]) -> None:
    """Raise BadInput for an empty run, k outside 1 … d_sae, or two members that would be the same SAE."""
    if not members:
        raise BadInput("no SAE to train: the grid of seeds, widths and sparsities is empty")
    for m in members:
        if not 1 <= m.k <= m.d_sae:
            raise BadInput(f"k {m.k} with d_sae {m.d_sae}: 1 ≤ k ≤ d_sae expected")
    if len(set(members)) < len(members):
        raise BadInput("two members of the grid are identical: distinct seeds expected")


def train(
    store: ActivationStore,
    members: list[Member],
    config: TrainingConfig,
    device: torch.device,
    state_path: Path,
    seconds_between_saves: float = 15.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Trained], list[int]]:
    """Train all members in one pass over the store.

    The state is saved to `state_path` now and then; the same call resumes there, bit-identically.

    Returns:
        (one `Trained` a member, in their order; the steps at which the loss curves were read)

    Raises:
        BadInput: an impossible member, or activations that are not finite.
    """
    check_members(members)
    train_rows, _ = store.split(config.heldout_fraction)
    sample = store.read(0, min(len(train_rows), config.window_rows)).to(dtype)
    variance = (sample - sample.mean(0)).square().sum(1).mean().item()
    if variance == 0:
        raise BadInput(f"activation store: {store.folder}: all rows are equal; there is nothing to learn")
    # The activations are scaled to unit variance a coordinate on average, so that one learning rate fits every hook;
    # `unscaled` folds this into the weights.
    scale = math.sqrt(store.d_in / variance)
    centre = geometric_median(sample[:8192]) if config.b_dec_init == "geometric_median" else sample.mean(0)

    stacks = []
    for d_sae in dict.fromkeys(m.d_sae for m in members):
        chosen = [i for i, m in enumerate(members) if m.d_sae == d_sae]
        stacks.append(Stack(chosen, [members[i] for i in chosen], store.d_in, centre * scale, device, dtype))

    key = digest({"members": [asdict(m) for m in members], "config": asdict(config), "store": store.digest})
    curve_steps = sorted(
        {round(i * (config.steps - 1) / (config.curve_points - 1)) for i in range(config.curve_points)}
    )
    curves = torch.zeros(len(curve_steps), len(members))
    start = _restore(state_path, key, stacks, curves)
    snapshot_steps = set(config.snapshot_steps())
    if start == 0:
        for stack in stacks:
            stack.snapshot()

    seen = start * config.batch_size
    readers = {
        seed: BatchReader(store, train_rows, seed, seen, config.window_rows)
        for seed in dict.fromkeys(m.order_seed for m in members)
    }
    saved, save_seconds = time.monotonic(), 0.0
    with progress(f"training {len(members)} SAEs (steps)", config.steps, start) as advance:
        for step in range(start, config.steps):
            rows = min(config.batch_size, config.tokens - step * config.batch_size)
            batches = {seed: reader.take(rows).to(device, dtype) * scale for seed, reader in readers.items()}
            for stack in stacks:
                x = torch.stack([batches[members[i].order_seed] for i in stack.members])
                main = stack.step(x, store.d_in, config, step)
                if step in curve_steps:
                    curves[curve_steps.index(step), stack.members] = main.float().cpu()
                if step + 1 in snapshot_steps:
                    stack.snapshot()
            advance(1)
            if time.monotonic() - saved > max(seconds_between_saves, 50 * save_seconds):
                began = time.monotonic()
                _save(state_path, key, step + 1, stacks, curves)
                saved = time.monotonic()
                save_seconds = saved - began

    trained: dict[int, Trained] = {}
    for stack in stacks:
        for position, i in enumerate(stack.members):
            sae = unscaled({name: p[position].detach().cpu() for name, p in stack.params.items()}, members[i].k, scale)
            decoders = torch.stack([s[position] for s in stack.snapshots])
            curve = curves[:, i].tolist()
            if not all(map(math.isfinite, curve)):
                raise BadInput(f"training of seed {members[i].seed} diverged: a lower --learning-rate is needed")
            trained[i] = Trained(members[i], sae, decoders, curve, int(stack.aux_steps[position]))
    state_path.unlink(missing_ok=True)
    return [trained[i] for i in range(len(members))], curve_steps


def unscaled(params: dict[str, Tensor], k: int, scale: float) -> SAE:
    """The same SAE on activations that are not scaled.

    ReLU and top-k commute with a positive factor, so features f(s·x)/s need only `b_enc` and `b_dec` divided by s:
    encoder and decoder directions stay as they are, decoder rows of unit norm.
    """
    return SAE(
        W_enc=params["W_enc"], b_enc=params["b_enc"] / scale, W_dec=params["W_dec"], b_dec=params["b_dec"] / scale, k=k
    )


def _save(path: Path, key: str, step: int, stacks: list[Stack], curves: Tensor) -> None:
    tensors = {"step": torch.tensor(step), "curves": curves}
    for stack in stacks:
        tensors |= {f"{stack.d_sae}.{name}": t.cpu().contiguous() for name, t in stack.state().items()}
    write_bytes(path, save(tensors, metadata={"key": key, "sha256": _fingerprint(tensors)}))


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()


def _restore(path: Path, key: str, stacks: list[Stack], curves: Tensor) -> int:
    """Load the state of an interrupted run into the stacks; returns the step to go on with (0: none usable)."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("key") != key:
                raise ValueError("it belongs to another run")
            state = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("sha256") != _fingerprint(state):
            raise ValueError("it was changed after it was written")
        for stack in stacks:
            stack.restore(
                {n.removeprefix(f"{stack.d_sae}."): t for n, t in state.items() if n.startswith(f"{stack.d_sae}.")}
            )
        curves.copy_(state["curves"])
        log.info("resuming training at step %d", int(state["step"]))
        return int(state["step"])
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s cannot be resumed (%s); training starts again", path, error)
        return 0


@torch.no_grad()
def evaluate(sae: SAE, store: ActivationStore, rows: range, batch: int = 8192) -> tuple[dict[str, float], Tensor]:
    """Held-out figures of one SAE, streamed.

    Returns:
        ({explained_variance: 1 − Σ‖x−x̂‖²/Σ‖x−mean(x)‖², mse: a coordinate, l0: active features a row, dead_share:
        features active on none of the rows}, firing rate `[d_sae]`)
    """
    centre, _ = store.stats()
    fired = torch.zeros(sae.d_sae, dtype=torch.float64)
    error = total = 0.0
    offset = torch.zeros(store.d_in, dtype=torch.float64)
    for start in range(rows.start, rows.stop, batch):
        x = store.read(start, min(start + batch, rows.stop))
        features = sae.encode(x)
        error += (x - sae.decode(features)).double().square().sum().item()
        shifted = x.double() - centre
        total += shifted.square().sum().item()
        offset += shifted.sum(0)
        fired += (features > 0).sum(0)
    total -= offset.square().sum().item() / len(rows)
    figures = {
        "explained_variance": 1 - error / total,
        "mse": error / (len(rows) * store.d_in),
        "l0": fired.sum().item() / len(rows),
        "dead_share": (fired == 0).double().mean().item(),
    }
    return figures, fired / len(rows)
