"""A transformer that learns (a, b, =) -> (a + b) mod p, and the Fourier structure that its solution has.

Loss and accuracy are measured only at "=", and the input does not hold the answer. The architecture (one layer, ReLU
MLP, no LayerNorm) is that of Nanda et al., "Progress measures for grokking via mechanistic interpretability",
arXiv 2301.05217, section 3.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from husai.runs.code import code_version
from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import digest, publish_directory, read_json, sha256_file, write_bytes, write_json
from husai.runs.progress import progress
from husai.runs.seeds import derive_seed, generator

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("husai")


@dataclass(frozen=True)
class ModularAdditionConfig:
    """Task, architecture and training of the subject."""

    modulus: int = 113
    layout: Literal["equals", "published"] = "equals"
    """`equals`: (a, b, =). `published`: (BOS, a, +, b, =, answer, EOS), the earlier study's sequence."""
    n_layers: int = 1
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 512
    train_fraction: float = 0.8
    epochs: int = 100
    """Largest number of epochs. Training ends once the target has held for `hold_epochs`. 0: no training."""
    hold_epochs: int = 5
    target_accuracy: float = 0.999
    """Smallest held-out accuracy with which later phases accept the model."""
    batch_size: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    warmup_steps: int = 10
    seed: int = 42

    @property
    def answer_position(self) -> int:
        """Position of "=", at which the answer is predicted."""
        return 2 if self.layout == "equals" else 4

    @property
    def vocabulary(self) -> int:
        return self.modulus + (1 if self.layout == "equals" else 4)


def pairs(modulus: int) -> tuple[Tensor, Tensor]:
    """All pairs (a, b), each `[modulus²]`."""
    n = torch.arange(modulus)
    return n.repeat_interleave(modulus), n.repeat(modulus)


def tokens(config: ModularAdditionConfig, a: Tensor, b: Tensor, answer: Tensor) -> Tensor:
    """Input tokens `[rows, positions]`. Only the `published` layout holds the answer."""
    p = config.modulus
    if config.layout == "equals":
        return torch.stack([a, b, torch.full_like(a, p)], dim=1)
    bos, plus, equals, eos = (torch.full_like(a, p + i) for i in range(4))
    return torch.stack([bos, a, plus, b, equals, answer, eos], dim=1)


def dataset(config: ModularAdditionConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens `[p², positions]`, answers `[p²]`, training rows, held-out rows). The split depends on the seed alone."""
    a, b = pairs(config.modulus)
    answer = (a + b) % config.modulus
    order = torch.randperm(len(a), generator=generator(config.seed, "split"))
    n_train = int(config.train_fraction * len(a))
    return tokens(config, a, b, answer), answer, order[:n_train], order[n_train:]


def build_model(config: ModularAdditionConfig) -> HookedTransformer:
    """The untrained model, seeded. Only this function of the project builds a HookedTransformer."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it reports its device on stdout
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "model"))
            return HookedTransformer(
                HookedTransformerConfig(
                    n_layers=config.n_layers,
                    d_model=config.d_model,
                    n_heads=config.n_heads,
                    d_head=config.d_model // config.n_heads,
                    d_mlp=config.d_mlp,
                    act_fn="relu",
                    normalization_type=None,
                    d_vocab=config.vocabulary,
                    d_vocab_out=config.modulus,
                    n_ctx=3 if config.layout == "equals" else 7,
                    device="cpu",
                    init_weights=True,
                )
            )


def answer_logits(model: HookedTransformer, config: ModularAdditionConfig, x: Tensor) -> Tensor:
    """Logits `[rows, modulus]` at "=".

    The result equals the model's own forward pass at a third of its cost. Later positions are left out, because
    attention is causal, and the last block computes the answer's position alone.
    """
    x = x[:, : config.answer_position + 1]
    stream = model.W_E[x] + model.W_pos[: x.shape[1]]
    for block in model.blocks:
        attention, mlp, last = block.attn, block.mlp, block is model.blocks[-1]
        at = stream[:, -1:] if last else stream
        query = torch.einsum("rpd,hde->rhpe", at, attention.W_Q) + attention.b_Q[:, None]
        key = torch.einsum("rpd,hde->rhpe", stream, attention.W_K) + attention.b_K[:, None]
        value = torch.einsum("rpd,hde->rhpe", stream, attention.W_V) + attention.b_V[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=not last)
        at = at + torch.einsum("rhpe,hed->rpd", mixed, attention.W_O) + attention.b_O
        stream = at + (at @ mlp.W_in + mlp.b_in).relu() @ mlp.W_out + mlp.b_out
    return stream[:, -1] @ model.W_U + model.b_U


@torch.no_grad()
def evaluate(model: HookedTransformer, config: ModularAdditionConfig, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(mean cross-entropy in nats, accuracy) at "="."""
    device = next(model.parameters()).device
    loss = correct = 0.0
    for part, target in zip(x.split(4096), y.split(4096), strict=True):
        logits = answer_logits(model, config, part.to(device)).float().cpu()
        loss += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        correct += (logits.argmax(-1) == target).sum().item()
    return loss / len(y), correct / len(y)


def train(config: ModularAdditionConfig, device: torch.device) -> tuple[HookedTransformer, dict]:
    """Train until held-out accuracy has stayed at the target for `hold_epochs`; returns the model and its history.

    AdamW with betas (0.9, 0.98), linear warm-up, and cosine decay over `epochs`. `history` has one row for each epoch.
    """
    model = build_model(config).to(device, print_details=False)
    x, y, train_rows, heldout_rows = dataset(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    steps = max(1, config.epochs * math.ceil(len(train_rows) / config.batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / config.warmup_steps) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    batches = generator(config.seed, "batches")
    history, held = [], 0
    with progress("training the transformer (epochs)", config.epochs) as advance:
        for epoch in range(1, config.epochs + 1):
            order = train_rows[torch.randperm(len(train_rows), generator=batches)]
            total = 0.0
            for rows in order.split(config.batch_size):
                logits = answer_logits(model, config, x[rows].to(device))
                loss = torch.nn.functional.cross_entropy(logits, y[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            heldout_loss, accuracy = evaluate(model, config, x[heldout_rows], y[heldout_rows])
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": total / len(train_rows),
                    "heldout_loss": heldout_loss,
                    "heldout_accuracy": accuracy,
                }
            )
            advance(1)
            held = held + 1 if accuracy >= config.target_accuracy else 0
            if held == config.hold_epochs:
                break
    if not history:  # untrained
        heldout_loss, accuracy = evaluate(model, config, x[heldout_rows], y[heldout_rows])
    training = {
        "solved": held == config.hold_epochs,
        "heldout_loss": heldout_loss,
        "heldout_accuracy": accuracy,
        "heldout_rows": len(heldout_rows),
        "epochs": len(history),
        "history": history,
    }
    return model, training


# ---------------------------------------------------------------------------------------------------------------------
# The subject folder: subject.json and model.safetensors


def train_or_find(
    config: ModularAdditionConfig, root: Path, device: torch.device, threads: int, force: bool = False
) -> Path:
    """Folder of this subject below `root`. The subject is trained if it is missing, or again with `force`."""
    key = digest({"config": asdict(config), "code": code_version(train), "device": device.type, "threads": threads})
    folder = root / f"modular_addition-{key[:16]}"

    def build(partial: Path) -> None:
        log.info("training the modular-addition transformer (seed %d)", config.seed)
        model, training = train(config, device)
        if config.epochs and not training["solved"]:
            raise CheckFailed(
                f"the transformer did not solve its task: held-out accuracy {training['heldout_accuracy']:.4f} after "
                f"{training['epochs']} epochs, {config.target_accuracy} for {config.hold_epochs} epochs required"
            )
        write_bytes(partial / "model.safetensors", save({k: v.contiguous().cpu() for k, v in _weights(model).items()}))
        description = {
            "kind": "modular_addition",
            "config": asdict(config),
            "weights_sha256": sha256_file(partial / "model.safetensors"),
            "training": training,
        }
        write_json(partial / "subject.json", description | {"sha256": digest(description)})

    publish_directory(folder, build, replace=force)
    return folder


def _weights(model: HookedTransformer) -> dict[str, Tensor]:
    """Parameters of the model. Buffers such as the causal mask follow from the configuration."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def describe(folder: Path, require_solved: bool = True) -> dict:
    """Read and check a subject folder without loading the model. Adds `digest`, which names configuration and weights.

    Raises:
        BadInput: the folder is no modular-addition subject, its weights changed, or it did not solve its task.
    """
    description = read_json(folder / "subject.json", "subject")
    if not isinstance(description, dict) or description.get("kind") != "modular_addition":
        raise BadInput(f"subject: {folder / 'subject.json'} does not describe a modular-addition transformer")
    try:
        if description.pop("sha256") != digest(description):
            raise ValueError("it was changed after it was written")
        config = _config(description)
        expected, training = description["weights_sha256"], description["training"]
        solved, accuracy = training["solved"] is True, float(training["heldout_accuracy"])
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"subject: {folder / 'subject.json'} is damaged ({reason})") from None
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_file(weights) != expected:
        raise BadInput(
            f"subject: {weights} is missing or is not the file that subject.json names (sha256 differs); "
            "delete the folder to have it made again"
        )
    if require_solved and not solved:
        raise BadInput(
            f"subject: {folder} has held-out accuracy {accuracy:.4f}; at least {config.target_accuracy} is required"
        )
    return description | {"digest": digest({"config": description["config"], "weights": expected})}


def _config(description: dict) -> ModularAdditionConfig:
    """The configuration in a description. Raises TypeError or ValueError for a field of another type."""
    config = ModularAdditionConfig(**description["config"])  # TypeError for unknown fields
    return TypeAdapter(ModularAdditionConfig).validate_python(asdict(config))


def load(folder: Path, require_solved: bool = True) -> tuple[HookedTransformer, ModularAdditionConfig, dict]:
    """(model, config, description) of a subject folder. Refuses the same folders as `describe`."""
    description = describe(folder, require_solved)
    config = _config(description)
    try:
        model = build_model(config)
        state = load_file(folder / "model.safetensors")
        if state.keys() != _weights(model).keys():
            raise KeyError("other parameter names")
        model.load_state_dict(state, strict=False)
    except (SafetensorError, RuntimeError, KeyError, ValueError, ArithmeticError, AssertionError) as error:
        raise BadInput(f"subject: {folder / 'model.safetensors'} does not fit its config ({error})") from None
    return model.eval(), config, description


# ---------------------------------------------------------------------------------------------------------------------
# Ground truth


def fourier_basis(modulus: int) -> Tensor:
    """Orthonormal real Fourier basis of Z_p for odd p, `[p, p]`: the constant, then cos and sin of each frequency once.

    Row 0 is constant; rows 2f−1 and 2f are cos and sin of frequency f = 1 … (p−1)/2. float64.
    """
    if modulus % 2 == 0:
        raise ValueError(f"modulus {modulus} is even; the basis is given for odd moduli")
    angle = 2 * math.pi * torch.arange(modulus, dtype=torch.float64) / modulus
    rows = [torch.full((modulus,), 1 / math.sqrt(modulus), dtype=torch.float64)]
    for f in range(1, (modulus - 1) // 2 + 1):
        rows += [torch.cos(f * angle) * math.sqrt(2 / modulus), torch.sin(f * angle) * math.sqrt(2 / modulus)]
    return torch.stack(rows)


def fourier_power(embedding: Tensor) -> Tensor:
    """Power of `embedding [p, d]` at frequencies 0 (the constant), 1, …, (p−1)/2; it sums to ‖embedding‖². float64."""
    power = (fourier_basis(len(embedding)) @ embedding.double()).square().sum(1)
    return torch.cat([power[:1], power[1::2] + power[2::2]])


def key_frequencies(embedding: Tensor, n: int = 5) -> tuple[list[int], float]:
    """The `n` strongest frequencies and their share of the power outside the constant."""
    power = fourier_power(embedding)[1:]
    strongest = power.topk(n).indices
    return sorted((strongest + 1).tolist()), (power[strongest].sum() / power.sum()).item()
