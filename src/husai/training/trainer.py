"""The stacked trainer: many SAEs in one pass over the same activations.

Members of one architecture and width form a stack (`stack.py`). Its parameters share a leading axis and
one batched step. Members can differ in architecture, seed, width, k and learning rate. Members with the
same data order share the batches. A stacked run equals separate runs.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from husai.activations.order import BatchReader, WindowReader
from husai.activations.outliers import MULTIPLE, norm_limit, sampled_norms, shrunk
from husai.activations.store import ActivationStore
from husai.activations.stream import HookStream
from husai.dictionaries import jumprelu
from husai.dictionaries.families import FAMILIES
from husai.dictionaries.family import Shape
from husai.dictionaries.sae import SAE, Autoencoder
from husai.evidence.schemas import Dropped, Heldout, Outliers
from husai.runs.errors import BadInput
from husai.runs.files import digest, write_bytes
from husai.runs.progress import progress
from husai.training import memory
from husai.training.consistency import References
from husai.training.stack import Member, Stack, StepSettings

log = logging.getLogger("husai")
CALIBRATION_VALUES = 2**23
"""Number of pre-activations on which JumpReLU thresholds are calibrated."""
SAMPLED_ROWS = 65_536
"""Largest number of rows from which centre and scale are computed."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that all members of a run share."""

    tokens: int = 1_000_000
    """Exact number of rows that each member sees."""
    batch_size: int = 1024
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    """The learning rate falls linearly to zero over this last share of the steps."""
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int = 50_000
    """A feature that has not fired for this many rows counts as dead and is trained by AuxK."""
    heldout_fraction: float = 0.2
    b_dec_init: str = "geometric_median"
    """Initial `b_dec`: `geometric_median` or `mean` of a sample of the training rows."""
    snapshots: int = 8
    """Number of kept decoders, at geometrically spaced steps, with the untrained and the final one."""
    curve_points: int = 100
    window_rows: int = 65_536
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    """Decoupled weight decay of the encoder, and of decoders without UNIT_DECODER."""
    tied_init: bool = True
    """Each encoder starts as the transpose of its decoder; otherwise as independent unit directions."""
    freeze_decoder: bool = False
    """Decoders keep their initial values."""
    propose: bool | None = None
    """TopK: a bfloat16 product proposes the candidates among the pre-activations (`kernels.sparse.Choice`).
    None: the device decides (`proposes`)."""

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_size)

    def proposes(self, device: torch.device, d_in: int) -> bool:
        """The setting `propose`, by default true if bfloat16 is faster on the device and d_in is large."""
        if self.propose is not None:
            return self.propose
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return device.type == "cuda" or (fast and d_in >= 256)

    def snapshot_steps(self) -> list[int]:
        """0, geometrically spaced steps, and the last step; two more in the last third give a slope."""
        inner = {round(self.steps ** (i / (self.snapshots - 1))) for i in range(1, self.snapshots)}
        late = {math.ceil(self.steps * part) for part in (2 / 3, 5 / 6)}
        return [0, *sorted(inner | late)]

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, constant, linear decay to zero."""
        warmup, decay = self.warmup_fraction * self.steps, self.decay_fraction * self.steps
        return min(1.0, (step + 1) / max(1.0, warmup), (self.steps - step) / max(1.0, decay))


@dataclass
class Trained:
    """A trained member."""

    member: Member
    sae: SAE
    decoders: Tensor
    """`[snapshots, d_sae, d_in]`, rows of norm 1."""
    curve: list[float]
    """‖x − x̂‖² / variance on the batches at `curve_steps`."""
    aux_steps: int
    """Number of steps on which the member had dead features."""


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
    """Raise BadInput for no members, an unknown architecture, k outside 1 … d_sae, or identical members."""
    if not members:
        raise BadInput("no SAE to train: the grid of seeds, widths and sparsities is empty")
    for m in members:
        if m.family not in FAMILIES:
            raise BadInput(f"family {m.family!r}: one of {', '.join(FAMILIES)} expected")
        if not 1 <= m.k <= m.d_sae:
            raise BadInput(f"k {m.k} with d_sae {m.d_sae}: 1 ≤ k ≤ d_sae expected")
    if len(set(members)) < len(members):
        raise BadInput("two members of the grid are identical: distinct seeds expected")


@dataclass(frozen=True)
class Scaling:
    """Map of activations to mean 0 and unit average variance of a coordinate.

    One learning rate then fits every hook. `folded` moves the map into the weights. An outlier of 300 times
    the norm would weigh as much as 90,000 rows. Therefore centre and scale are computed without outliers,
    and outliers are shrunk to SHRUNK_NORM times the median norm.
    """

    centre: Tensor
    """`[d_in]`."""
    scale: float
    limit: float = math.inf
    """Norm above which a row is an outlier."""

    @classmethod
    def of(cls, store: ActivationStore | HookStream, config: TrainingConfig, dtype: torch.dtype) -> Scaling:
        """The scaling of a sample of the training rows.

        Raises:
            BadInput: the rows do not vary.
        """
        train_rows, _ = store.split(config.heldout_fraction)
        sample = store.read(0, min(len(train_rows), config.window_rows, SAMPLED_ROWS)).to(dtype)
        norms = sample.norm(dim=1)
        limit = norm_limit(norms)
        sample = sample[norms <= limit]
        variance = (sample - sample.mean(0)).square().sum(1).mean().item()
        if variance == 0:
            raise BadInput(f"activation store: {store.folder}: all rows are equal; there is nothing to learn")
        centre = geometric_median(sample[:8192]) if config.b_dec_init == "geometric_median" else sample.mean(0)
        return cls(centre, math.sqrt(store.d_in / variance), limit)

    def __call__(self, x: Tensor) -> Tensor:
        return (shrunk(x.to(self.centre.dtype), self.limit) - self.centre) * self.scale


def train(
    store: ActivationStore,
    members: list[Member],
    config: TrainingConfig,
    device: torch.device,
    state_path: Path,
    seconds_between_saves: float = 15.0,
    dtype: torch.dtype = torch.float32,
    target: ActivationStore | None = None,
    references: References | None = None,
    in_order: bool = False,
) -> tuple[list[Trained], list[int]]:
    """Train all members in one pass over the store.

    The state is saved to `state_path` at intervals. The same call resumes there, bit-identically.

    Args:
        target: activations of another hook on the same inputs, row by row, that transcoders reconstruct.
        references: dictionaries that members with a reference are pulled towards.
        in_order: take the rows in the order of the store, shuffled in windows of `window_rows`, like a
            stream.

    Returns:
        (a `Trained` for each member, in order; steps of the loss curves)

    Raises:
        BadInput: an impossible member, stores that do not fit together, or activations that are not finite.
    """
    training = Training(store, members, config, device, state_path, dtype, target, references, in_order)
    run_together([training], seconds_between_saves)
    return training.finish()


def run_together(trainings: list[Training], seconds_between_saves: float = 15.0) -> None:
    """Take all steps of several trainings.

    They have the same number of steps. Trainings on one stream also have the same window.
    """
    steps, start = trainings[0].config.steps, min(t.start for t in trainings)
    saved, save_seconds = time.monotonic(), 0.0
    what = f"training {sum(len(t.members) for t in trainings)} SAEs (steps)"
    with progress(what, steps, start) as advance:
        for step in range(start, steps):
            for training in trainings:
                if step >= training.start:  # an interruption can separate the saved states of two trainings
                    training.step(step)
            advance(1)
            if time.monotonic() - saved > max(seconds_between_saves, 50 * save_seconds):
                began = time.monotonic()
                for training in trainings:
                    if step >= training.start:
                        training.save(step + 1)
                saved = time.monotonic()
                save_seconds = saved - began


class Training:
    """SAEs of one hook during their training. The arguments are those of `train`.

    Args:
        store: activations, or the stream of a hook, which is read in order.
    """

    def __init__(
        self,
        store: ActivationStore | HookStream,
        members: list[Member],
        config: TrainingConfig,
        device: torch.device,
        state_path: Path,
        dtype: torch.dtype = torch.float32,
        target: ActivationStore | None = None,
        references: References | None = None,
        in_order: bool = False,
    ):
        self.store, self.members, self.config = store, members, config
        self.state_path, self.dtype = state_path, dtype
        check_members(members)
        check_references(store, members, references)
        check_target(store, target, members)
        written: ActivationStore | HookStream = target or store
        self.train_rows, _ = store.split(config.heldout_fraction)
        if in_order:
            check_order(store, config)
        self.x_scaling = Scaling.of(store, config, dtype)
        self.y_scaling = self.x_scaling if target is None else Scaling.of(target, config, dtype)
        self.settings = StepSettings(
            config.betas,
            config.weight_decay,
            config.aux_coefficient,
            config.dead_after_tokens,
            config.proposes(device, store.d_in),
            config.steps,
            config.freeze_decoder,
        )
        apart = (config.tied_init, references)
        self.stacks: list[tuple[list[int], Stack]] = []
        """(positions in `members`, stack of these members)."""
        divided = memory.stacks(members, memory_sizes(store, target, config), device)
        if len(divided) > len({(m.family, m.d_sae) for m in members}):
            log.info("SAEs that do not fit into memory in one step are divided: %s a step", [len(c) for c in divided])
        for chosen in divided:
            shape = Shape(store.d_in, written.d_in, members[chosen[0]].d_sae)
            self.stacks.append((chosen, Stack([members[i] for i in chosen], shape, device, dtype, *apart)))

        settled: dict[str, Any] = {"members": [asdict(m) for m in members]}
        settled |= {"config": asdict(config), "settings": asdict(self.settings)}
        settled |= {"every": None if references is None else references.every, "stacks": divided}
        settled |= {"in order": True} if in_order else {}
        self.key = digest(settled | {"store": store.digest, "target": written.digest})
        self.curve_steps = sorted(
            {round(i * (config.steps - 1) / (config.curve_points - 1)) for i in range(config.curve_points)}
        )
        self.curves = torch.zeros(len(self.curve_steps), len(members), device=device)
        self.start = _restore(state_path, self.key, self.stacks, self.curves)
        self.snapshot_steps = set(config.snapshot_steps())
        if self.start == 0:
            for _, stack in self.stacks:
                stack.snapshot()

        def readers(source: ActivationStore | HookStream, scaling: Scaling) -> dict[int, Reader]:
            seeds = dict.fromkeys(m.order_seed for m in members)
            at, window = self.start * config.batch_size, config.window_rows
            if in_order:
                n = len(self.train_rows)
                return {s: Reader(WindowReader(source, n, s, at, window), scaling, device) for s in seeds}
            assert isinstance(source, ActivationStore)  # a stream is read in order
            # Rows that fit into one window are read once for all data orders and epochs.
            rows = self.train_rows
            held = source.read(rows.start, rows.stop) if len(rows) <= window else None
            return {s: Reader(BatchReader(source, rows, s, at, window, held=held), scaling, device) for s in seeds}

        self.x_readers = readers(store, self.x_scaling)
        self.y_readers = self.x_readers if target is None else readers(target, self.y_scaling)

    def step(self, step: int) -> None:
        """One step of every member."""
        rows = min(self.config.batch_size, self.config.tokens - step * self.config.batch_size)
        xs = {seed: reader.take(rows) for seed, reader in self.x_readers.items()}
        same = self.y_readers is self.x_readers
        ys = xs if same else {seed: reader.take(rows) for seed, reader in self.y_readers.items()}
        for chosen, stack in self.stacks:
            x = stacked([xs[m.order_seed] for m in stack.members])
            y = x if ys is xs else stacked([ys[m.order_seed] for m in stack.members])
            error = stack.step(x, y, step, self.config.learning_rate_factor(step), self.settings)
            if step in self.curve_steps:
                self.curves[self.curve_steps.index(step), chosen] = error.float()
            if step + 1 in self.snapshot_steps:
                stack.snapshot()

    def save(self, step: int) -> None:
        """Save the state before this step."""
        _save(self.state_path, self.key, step, self.stacks, self.curves)

    def finish(self) -> tuple[list[Trained], list[int]]:
        """The result of `train`. The saved state is deleted."""
        trained: dict[int, Trained] = {}
        for chosen, stack in self.stacks:
            for position, i in enumerate(chosen):
                m, curve = self.members[i], self.curves[:, i].tolist()
                scalings = self.x_scaling, self.y_scaling
                sae = folded(stack.trained(position), stack.family.ARCHITECTURE, m.k, *scalings)
                if m.family == "jumprelu":
                    rows = min(len(self.train_rows), CALIBRATION_VALUES // m.d_sae)
                    sae = jumprelu.calibrated(sae, self.store.read(0, rows).to(self.dtype), m.k)
                if not all(map(math.isfinite, curve)) or not all(t.isfinite().all() for t in sae.weights.values()):
                    raise BadInput(f"training of seed {m.seed} diverged: a lower --learning-rate is needed")
                decoders = torch.stack([s[position] for s in stack.snapshots])
                trained[i] = Trained(m, sae, decoders, curve, int(stack.aux_steps[position]))
        self.state_path.unlink(missing_ok=True)
        return [trained[i] for i in range(len(self.members))], self.curve_steps


def check_order(store: ActivationStore | HookStream, config: TrainingConfig) -> None:
    """Raise BadInput if the rows cannot be taken in order, each once, in windows of whole batches."""
    rows = len(store.split(config.heldout_fraction)[0])
    if config.tokens > rows:
        raise BadInput(f"--tokens {config.tokens}: each row is seen once; at most {rows} expected")
    if config.window_rows % config.batch_size:
        raise BadInput(
            f"--buffer-rows {config.window_rows}: a multiple of --batch-size {config.batch_size} expected, because the "
            "buffer is filled again in place"
        )


def memory_sizes(
    store: ActivationStore | HookStream, target: ActivationStore | None, config: TrainingConfig
) -> memory.Sizes:
    return memory.Sizes(store.d_in, (target or store).d_in, config.batch_size, len(config.snapshot_steps()))


@dataclass
class Reader:
    """A stream of scaled batches on the device."""

    rows: BatchReader | WindowReader
    scaling: Scaling
    device: torch.device

    def take(self, n: int) -> Tensor:
        return self.scaling(self.rows.take(n)).to(self.device)


def stacked(batches: list[Tensor]) -> Tensor:
    """Batches as one tensor `[n, rows, d]`; a view if all members see the same batch."""
    if all(b is batches[0] for b in batches):
        return batches[0].expand(len(batches), -1, -1)
    return torch.stack(batches)


def check_references(store: ActivationStore | HookStream, members: list[Member], references: References | None) -> None:
    """Raise BadInput for a pulled member without a reference of its width, and for a pulled transcoder."""
    for m in members:
        if m.reference is None and m.assignment_weight:
            raise BadInput(f"seed {m.seed}: assignment weight {m.assignment_weight} without a reference")
        if m.reference is None:
            continue
        reference = None if references is None else references.decoders.get(m.reference)
        shape = None if reference is None else tuple(reference.shape)
        if shape != (m.d_sae, store.d_in) or "transcoder" in m.family:
            raise BadInput(f"seed {m.seed}: reference of shape {shape}; an SAE's ({m.d_sae}, {store.d_in}) expected")


def check_target(store: ActivationStore | HookStream, target: ActivationStore | None, members: list[Member]) -> None:
    """Raise BadInput unless transcoders, and no SAEs, have a second store of the same inputs and subject."""
    transcoders = ["transcoder" in m.family for m in members]
    if any(transcoders) != (target is not None) or not all(t == transcoders[0] for t in transcoders):
        raise BadInput("transcoders, and only they, need a second activation store, of the hook they reconstruct")
    if target is None:
        return
    assert isinstance(store, ActivationStore)  # a stream has no second one
    ours, theirs = store.manifest, target.manifest
    alike = ("rows", "subject_digest", "position", "row_seed", "control")
    if any(getattr(ours, name) != getattr(theirs, name) for name in alike):
        raise BadInput(
            f"activation store: {target.folder} does not hold the same inputs' activations as {store.folder}, "
            "in the same order"
        )


def folded(weights: dict[str, Tensor], architecture: str, k: int, x: Scaling, y: Scaling) -> SAE:
    """The same SAE on activations that are neither centred nor scaled.

    ReLU, jumps and top-k commute with a positive factor, therefore features f(x.scale · …)/y.scale leave the
    rows of the decoder unchanged. An SAE has x = y, which leaves the encoder directions unchanged as well.
    """
    w = dict(weights)
    transcoder = "transcoder" in architecture
    if transcoder:
        w["b_enc"] = w["b_enc"] - x.scale * x.centre.cpu() @ w["W_enc"]
        w["W_enc"] = w["W_enc"] * (x.scale / y.scale)
    for name in ("b_enc", "threshold", "b_gate", "b_mag"):
        if name in w:
            w[name] = w[name] / y.scale
    w["b_dec"] = y.centre.cpu() + w["b_dec"] / y.scale
    if "W_skip" in w:
        skip = w["W_skip"] * (x.scale / y.scale)
        w["b_dec"] = w["b_dec"] - x.centre.cpu() @ skip
        w["W_skip"] = skip.T
    w = {name: t.contiguous() for name, t in w.items()}
    return SAE(w, architecture, k if architecture == "topk" else None, subtract_b_dec=not transcoder)


def _save(path: Path, key: str, step: int, stacks: list[tuple[list[int], Stack]], curves: Tensor) -> None:
    tensors = {"step": torch.tensor(step), "curves": curves.cpu()}
    for i, (_, stack) in enumerate(stacks):
        state = dict(stack.state()) | {"snapshots": torch.stack(stack.snapshots)}
        tensors |= {f"{i}.{name}": t.detach().cpu().contiguous() for name, t in state.items()}
    write_bytes(path, save(tensors, metadata={"key": key, "sha256": _fingerprint(tensors)}))


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()


def _restore(path: Path, key: str, stacks: list[tuple[list[int], Stack]], curves: Tensor) -> int:
    """Load the state of an interrupted run into the stacks; returns the next step (0: no usable state)."""
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
        for i, (_, stack) in enumerate(stacks):
            prefix = f"{i}."
            stack.restore({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
        curves.copy_(state["curves"])
        log.info("training resumes at step %d", int(state["step"]))
        return int(state["step"])
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s cannot be resumed (%s); training starts again", path, error)
        return 0


@dataclass
class Sums:
    """Sums over batches from which explained variance is computed."""

    offset: Tensor
    """Sum of the rows less a fixed centre, `[d_in]`, float64."""
    squares: float = 0.0
    error: float = 0.0
    rows: int = 0

    def add(self, difference: Tensor, shifted: Tensor) -> None:
        """Add rows `[rows, d_in]`, float64: `difference` is y − ŷ, `shifted` is y less the centre."""
        self.error += difference.square().sum().item()
        self.squares += shifted.square().sum().item()
        self.offset += shifted.sum(0)
        self.rows += len(shifted)

    @property
    def total(self) -> float:
        """Σ‖y − mean(y)‖²."""
        return self.squares - self.offset.square().sum().item() / self.rows

    @property
    def explained(self) -> float:
        return 1 - self.error / self.total


@torch.no_grad()
def evaluate(
    sae: Autoencoder, store: ActivationStore, rows: range, target: ActivationStore | None = None, batch: int = 8192
) -> tuple[Heldout, Tensor]:
    """(figures of an SAE on held-out rows, firing rate `[d_sae]`); of a transcoder from `store` to `target`.

    The rows are read `batch` at a time. Explained variance is 1 − Σ‖y−ŷ‖²/Σ‖y−mean(y)‖².

    Raises:
        BadInput: the rows are all equal.
    """
    target = target or store
    centre, _ = target.stats()
    sampled = sampled_norms(target, rows)
    limit, largest = norm_limit(sampled), 0.0
    everything, ordinary = (Sums(torch.zeros(target.d_in, dtype=torch.float64)) for _ in range(2))
    fired = torch.zeros(sae.d_sae, dtype=torch.float64)
    for start in range(rows.start, rows.stop, batch):
        x = store.read(start, min(start + batch, rows.stop))
        y = x if target is store else target.read(start, min(start + batch, rows.stop))
        features = sae.encode(x)
        difference, shifted = (y - sae.decode(features, x)).double(), y.double() - centre
        everything.add(difference, shifted)
        norms = y.norm(dim=1)
        kept, largest = norms <= limit, max(largest, norms.max().item())
        ordinary.add(difference[kept], shifted[kept])
        fired += (features > 0).sum(0)
    if everything.total <= 0:
        raise BadInput(
            f"activation store: {target.folder}: its {len(rows)} held-out rows are all equal; nothing to explain"
        )
    figures = Heldout(
        explained_variance=everything.explained,
        mse=everything.error / (len(rows) * target.d_in),
        l0=fired.sum().item() / len(rows),
        dead_share=(fired == 0).double().mean().item(),
    )
    if ordinary.rows < len(rows) and ordinary.rows and ordinary.total > 0:
        outliers = Outliers(
            share=(len(rows) - ordinary.rows) / len(rows),
            explained_variance=ordinary.explained,
            norms={str(q): sampled.quantile(q).item() for q in (0.5, 0.9, 0.99, 0.999)} | {"1": largest},
        )
        figures = figures.model_copy(update={"outliers": outliers})
    if (dropped := target.manifest.dropped_rows) is not None:
        multiple = (target.manifest.harvesting or {})[MULTIPLE]
        left_out = Dropped(max_norm_multiple=multiple, share=dropped / (dropped + target.rows))
        figures = figures.model_copy(update={"dropped": left_out})
    return figures, fired / len(rows)
