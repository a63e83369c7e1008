"""A stack: members of one architecture and width that take each step together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from husai.dictionaries.families import FAMILIES
from husai.dictionaries.family import Batch, Shape, unit_rows
from husai.kernels.sparse import backend
from husai.runs.seeds import generator
from husai.training.consistency import Consistency, References

DEAD_EVERY = 16
"""Steps between two counts of dead features. On a GPU each count waits for the device."""
PENALTY = 1e-3
"""Initial penalty of an architecture whose sparsity comes from a penalty."""
PENALTY_RATE = 0.02
"""Largest change of the penalty's logarithm in one step of a long run."""
PENALTY_RANGE = 12.0
"""Total change of the penalty's logarithm that a short run still allows: from 1e-3 to beyond 100."""


@dataclass(frozen=True)
class Member:
    """One SAE of a stack."""

    seed: int
    """Seed of the initialisation."""
    d_sae: int
    k: int
    """Active features a row: a limit for TopK architectures, a target for the others."""
    learning_rate: float
    order_seed: int
    """Seed of the data order. It is separate, therefore initialisation and order can vary alone."""
    family: str = "topk"
    assignment_weight: float = 0.0
    """λ of the pull towards a reference (`consistency.py`)."""
    reference: str | None = None
    """sha256 of the reference's checkpoint; None: the member has no reference."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of a run that each step reads."""

    betas: tuple[float, float]
    weight_decay: float
    aux_coefficient: float
    dead_after_tokens: int
    propose: bool
    steps: int = 10_000
    """Number of steps of the whole run."""
    freeze_decoder: bool = False


class StepGraph:
    """A step on a GPU, recorded once as a CUDA graph and replayed: one launch instead of some hundred.

    The first steps run one by one, because kernels are compiled in them. Then the step is recorded for
    the shape of the batch. The last batch can have another shape and runs by itself.
    """

    WARM_UP = 3

    def __init__(self, advance: Callable[[Tensor, Tensor, Tensor, StepSettings], Tensor], settings: StepSettings):
        self.advance, self.settings, self.steps = advance, settings, 0
        self.x: Tensor
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor, scalars: Tensor) -> Tensor:
        self.steps += 1
        if self.steps <= self.WARM_UP or (self.graph is not None and x.shape != self.x.shape):
            return self.advance(x, y, scalars, self.settings)
        if self.graph is None:
            self.x, self.scalars = x.clone(), scalars.clone()
            self.y = self.x if y is x else y.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.error = self.advance(self.x, self.y, self.scalars, self.settings)
        self.x.copy_(x)
        self.scalars.copy_(scalars)
        if y is not x:
            self.y.copy_(y)
        self.graph.replay()
        return self.error.clone()


class Stack:
    """Parameters, Adam moments, buffers and dead-feature counters of n members, all `[n, …]`."""

    def __init__(
        self,
        members: list[Member],
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        tied_init: bool = True,
        references: References | None = None,
    ):
        self.members, self.shape = members, shape
        self.family = FAMILIES[members[0].family]
        n, self.k = len(members), tuple(m.k for m in members)
        generators = [generator(m.seed, "init", m.d_sae) for m in members]
        params = self.family.init(shape, generators)
        if not tied_init:
            drawn = unit_rows(shape.d_sae, shape.d_in, [generator(m.seed, "encoder", m.d_sae) for m in members])
            norms = params["W_enc"].norm(dim=1).unsqueeze(-1)
            params["W_enc"] = (drawn * norms).transpose(1, 2)
        self.params = {name: p.to(device, dtype).requires_grad_() for name, p in params.items()}
        self.moments = {f"{moment}.{name}": torch.zeros_like(p) for name, p in self.params.items() for moment in "mv"}
        self.buffers = {
            "threshold": torch.full((n,), -1.0, device=device, dtype=dtype),
            "penalty": torch.full((n,), PENALTY, device=device, dtype=dtype),
        }
        self.learning_rate = torch.tensor([m.learning_rate for m in members], device=device)
        self.target_l0 = torch.tensor(self.k, device=device, dtype=torch.float32)
        self.silent = torch.zeros(n, shape.d_sae, dtype=torch.long, device=device)  # rows since it fired
        self.dead_mask = torch.zeros(n, shape.d_sae, dtype=torch.bool, device=device)
        self.aux_steps = torch.zeros(n, dtype=torch.long, device=device)
        self.consistency: Consistency | None = None
        if any(m.reference for m in members):
            assert references is not None  # `check_references` saw them
            weights = [m.assignment_weight for m in members]
            like = self.params["W_dec"].detach()
            self.consistency = Consistency([m.reference for m in members], weights, references, like)
        self.snapshots: list[Tensor] = []
        self.graph: StepGraph | None = None
        self._list_dead()

    def step(self, x: Tensor, y: Tensor, step: int, rate_factor: float, settings: StepSettings) -> Tensor:
        """One step on `x [n, rows, d_in]` towards `y [n, rows, d_out]`; returns ‖y − ŷ‖²/variance `[n]`."""
        if step % DEAD_EVERY == 0:
            self.dead_mask.copy_(self.silent > settings.dead_after_tokens)
            self._list_dead()
        if self.consistency and step % self.consistency.references.every == 0:
            self.consistency.assign(self.params["W_dec"].detach())
        beta1, beta2 = settings.betas
        scalars = [rate_factor, 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)]
        scalars = torch.tensor(scalars, dtype=torch.float64, pin_memory=x.is_cuda).to(x.device, non_blocking=True)
        if x.is_cuda and not any(map(len, self.dead)):
            self.graph = self.graph or StepGraph(self._advance, settings)
            return self.graph(x, y, scalars)
        return self._advance(x, y, scalars, settings)

    def _advance(self, x: Tensor, y: Tensor, scalars: Tensor, settings: StepSettings) -> Tensor:
        """Loss, gradients, Adam, counters, penalty. It waits for the device only if features are dead.

        Args:
            scalars: `[3]`, the learning rate's factor and Adam's two bias corrections.
        """
        batch = Batch(x, y, self.k, self.dead, settings.aux_coefficient, settings.propose)
        outcome = self.family.loss(self.params, self.buffers, batch)
        pull = self.consistency.loss(self.params["W_dec"]) if self.consistency else 0
        (outcome.loss + pull).sum().backward()
        self._adam(scalars, settings)
        self.silent.add_(x.shape[1]).masked_fill_(outcome.fired, 0)
        if not self.family.PENALISED:
            self.aux_steps.add_(self.dead_mask.any(1))
        else:
            # The penalty grows with the surplus of active features over the target.
            excess = (outcome.l0.clamp_min(0.1) / self.target_l0).log().clamp(-1, 1)
            rate = max(PENALTY_RATE, PENALTY_RANGE / settings.steps)
            self.buffers["penalty"].mul_((rate * excess).exp())
        return outcome.error

    @torch.no_grad()
    def _adam(self, scalars: Tensor, settings: StepSettings) -> None:
        """Adam (Kingma & Ba, arXiv 1412.6980) with a learning rate for each member.

        Decoder rows stay on the unit sphere if the architecture has UNIT_DECODER. Decoupled weight decay
        applies to matrices, except to rows of norm 1.
        """
        adam = backend(scalars.device.type).adam
        rate = self.learning_rate * scalars[0]
        for name, p in self.params.items():
            if name == "W_dec" and settings.freeze_decoder:
                p.grad = None
                continue
            tensors = [p, p.grad, self.moments[f"m.{name}"], self.moments[f"v.{name}"]]
            if name == "W_enc":  # stored feature by feature
                tensors = [t.transpose(1, 2) for t in tensors]
            unit = name == "W_dec" and self.family.UNIT_DECODER
            decay = settings.weight_decay if p.ndim == 3 and not unit else 0.0
            adam(*tensors, rate, decay, settings.betas, scalars[1:], unit)
            p.grad = None
        if "threshold" in self.params:
            self.params["threshold"].clamp_min_(0)

    def _list_dead(self) -> None:
        self.dead = tuple(mask.nonzero().flatten() for mask in self.dead_mask)

    def snapshot(self) -> None:
        """Keep the current decoder with rows of norm 1."""
        self.snapshots.append(torch.nn.functional.normalize(self.params["W_dec"].detach(), dim=-1).cpu())

    def trained(self, position: int) -> dict[str, Tensor]:
        """One member's tensors in SAELens' names, in the coordinates of training."""
        params, buffers = (
            {name: t[position].detach() for name, t in stacked.items()} for stacked in (self.params, self.buffers)
        )
        return {name: t.cpu() for name, t in self.family.weights(params, buffers).items()}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors from which an interrupted run resumes."""
        yield from {**self.params, **self.moments}.items()
        yield from ((f"buffer.{name}", t) for name, t in self.buffers.items())
        if self.consistency:
            yield "partners", self.consistency.partners
        for name in ("silent", "dead_mask", "aux_steps"):
            yield name, getattr(self, name)

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state():
            tensor.copy_(state[name])
        self.snapshots = list(state["snapshots"])
        self._list_dead()
