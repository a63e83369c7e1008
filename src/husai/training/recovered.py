"""Loss of a language model with an SAE spliced in: the cross-entropy with the reconstruction in the activation's place.

One forward pass of transformers' own modules serves several SAEs. The batch is repeated where it enters the hook's
block: the layers before run once a group of SAEs, the layers after run for all of the group together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from husai.activations.language_model import batches
from husai.dictionaries.sae import Autoencoder
from husai.runs.errors import BadInput
from husai.subjects.pretrained import LanguageModel

LAYER_ROWS = 8192
"""Rows `[copies × batch × position]` that pass a layer together, unless two copies of one input are longer."""
LOGIT_ROWS = 256
"""Predictions whose logits exist at one time, for any vocabulary."""


@dataclass(frozen=True)
class Replacement:
    """Map of a hook's activations `[n, d]` to their replacements: an SAE's reconstruction of its input."""

    subject: LanguageModel
    hook_name: str
    sae: Autoencoder | None = None
    """None: zeros."""

    def __call__(self, x: Tensor) -> Tensor:
        way, heads = self.subject.harvesting, self.subject.heads(self.hook_name)
        read = way.read_by_sae(x.float(), self.hook_name, heads)
        made = torch.zeros_like(read) if self.sae is None else self.sae.decode(self.sae.encode(read), read)
        return way.written(x, made, heads)


@torch.inference_mode()
def cross_entropies(subject: LanguageModel, hook_name: str, saes: Sequence[Autoencoder], texts: list[str]) -> dict:
    """Mean cross-entropy of the next token and KL divergence from the unchanged model, in nats.

    Texts are cut to n_ctx. An SAE replaces what it was trained on: every position but the first, or those that
    `subject.harvesting` keeps. Predictions made at these positions are counted.

    Returns:
        {"model": cross-entropy of the unchanged model, "zeroed": with zeros in the activation's place, "spliced": with
        each SAE's reconstruction, "kl_zeroed", "kl_spliced": KL(unchanged ‖ changed), "tokens": predictions counted}

    Raises:
        BadInput: the hook is at no input or output of a module of transformers, its activation is not
            `[batch, position, d_in]`, the model's logits cannot be made again from its final states, or no text has
            more than two tokens.
    """
    site, device = Site.of(subject, hook_name), next(subject.model.parameters()).device
    encoded = subject.harvesting.encode(subject.tokenizer, texts, subject.n_ctx)
    kept = [subject.harvesting.kept(np.array(ids)) for ids in encoded]
    # The last token predicts nothing.
    inputs = [(torch.tensor(ids), torch.from_numpy(k)) for ids, k in zip(encoded, kept, strict=True) if k[:-1].any()]
    if not inputs:
        raise BadInput(f"texts: none of {len(texts)} has more than two tokens; longer ones expected")
    replacements = [Replacement(subject, hook_name), *(Replacement(subject, hook_name, sae.to(device)) for sae in saes)]
    lengths = np.array([len(ids) for ids, _ in inputs])
    together = max(1, min(len(replacements), LAYER_ROWS // int(lengths.max()) - 1))  # one more copy is unchanged
    total, losses, divergences, count = 0.0, np.zeros(len(replacements)), np.zeros(len(replacements)), 0

    for chosen in batches(lengths, LAYER_ROWS // (1 + together)):
        padded = nn.utils.rnn.pad_sequence
        tokens, replaced = (padded([inputs[i][j] for i in chosen], batch_first=True).to(device) for j in (0, 1))
        ends = torch.from_numpy(lengths[chosen]).to(device)[:, None] - 1
        counted = replaced[:, :-1] & (torch.arange(tokens.shape[1] - 1, device=device) < ends)
        targets = tokens[:, 1:][counted].unsqueeze(1)
        count += len(targets)

        for first in range(0, len(replacements), together):
            group = slice(first, first + together)
            final = site.final_states(tokens, replaced, [None, *replacements[group]])
            if count == len(targets) and first == 0:
                final.check(tokens[:1, :LOGIT_ROWS])
            unchanged, *changed = final.of_copies(counted)
            for rows in torch.arange(len(targets), device=device).split(LOGIT_ROWS):
                log_p = final.logits(unchanged[rows]).log_softmax(-1)
                p = log_p.exp()
                if first == 0:
                    total -= log_p.gather(1, targets[rows]).sum().item()
                for i, of_copy in enumerate(changed, first):
                    log_q = final.logits(of_copy[rows]).log_softmax(-1)
                    losses[i] -= log_q.gather(1, targets[rows]).sum().item()
                    divergences[i] += torch.linalg.vecdot(p, log_p - log_q).sum().item()

    zeroed, *spliced = (losses / count).tolist()
    kl_zeroed, *kl_spliced = (divergences / count).tolist()
    return {
        "model": total / count,
        "zeroed": zeroed,
        "spliced": spliced,
        "kl_zeroed": kl_zeroed,
        "kl_spliced": kl_spliced,
        "tokens": count,
    }


def recovered(losses: dict) -> list[float]:
    """Share of the loss that each SAE recovers: 1 is the unchanged model, 0 is zeros in the activation's place."""
    lost = losses["zeroed"] - losses["model"]
    return [(losses["zeroed"] - value) / lost for value in losses["spliced"]]


# ---------------------------------------------------------------------------------------------------------------------
# The pass


@dataclass(frozen=True)
class Site:
    """A hook point in transformers' own modules."""

    transformer: nn.Module
    module: nn.Module
    """The module whose input or output the hook reads."""
    side: str
    """`hook_in` or `hook_out`."""
    blocks: list[nn.Module]
    """Blocks from the hook's own to the last one; empty for a hook outside the blocks."""

    @classmethod
    def of(cls, subject: LanguageModel, hook_name: str) -> Site:
        """Find the module that the bridge wraps at a hook.

        Raises:
            BadInput: the hook is at no input or output of a module of transformers.
        """
        point = subject.model.hook_dict.get(hook_name)
        for component in subject.model.modules() if point is not None else ():
            for side in ("hook_in", "hook_out"):
                module = subject.counterparts.get(getattr(component, "original_component", None))
                if getattr(component, side, None) is point and module is not None:
                    layer = re.match(r"blocks\.(\d+)\.", hook_name)
                    blocks = [subject.counterparts[b.original_component] for b in subject.model.blocks]
                    return cls(subject.transformer, module, side, blocks[int(layer[1]) :] if layer else [])
        raise BadInput(
            f"--hook-name {hook_name}: an SAE can be spliced in only where one of transformers' modules begins or ends"
        )

    def final_states(self, tokens: Tensor, replaced: Tensor, replacements: list[Replacement | None]) -> FinalStates:
        """Run all layers once for every replacement.

        Args:
            tokens: `[batch, position]`. replaced: the positions at which activations are replaced, likewise.
            replacements: None leaves the activation as it is.
        """
        batch, copies = len(tokens), len(replacements)

        def repeated(x):
            """A tensor of the batch, once a copy; everything else as it is."""
            of_batch = isinstance(x, Tensor) and x.ndim > 1 and len(x) == batch
            return x.repeat(copies, *[1] * (x.ndim - 1)) if of_batch else x

        def enter(module, args, kwargs):
            """Repeat what belongs to the batch: at the hook's block the activations, at every block the masks.

            A tensor of one row is broadcast anyway, therefore repeating position embeddings changes nothing.
            """
            return tuple(map(repeated, args)), {name: repeated(value) for name, value in kwargs.items()}

        def splice(x: Tensor) -> Tensor:
            """The chosen positions, each copy by its own replacement."""
            if x.ndim != 3:
                shape = f"{list(x.shape)} in transformers' modules; [batch, position, d_in] expected"
                raise BadInput(f"hook: its activation has the shape {shape}")
            parts = list((x if self.blocks else repeated(x)).split(batch))
            for i, replace in enumerate(replacements):
                if replace is not None:
                    rest = parts[i][:, 1:]
                    new = replace(rest.flatten(0, 1)).reshape(rest.shape).to(x.dtype)
                    new = torch.where(replaced[:, 1:, None], new, rest)
                    parts[i] = torch.cat([parts[i][:, :1], new], 1)
            return torch.cat(parts)

        def splice_input(module, args, kwargs):
            if args:
                return (splice(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, kwargs | {name: splice(kwargs[name])}

        def splice_output(module, args, output):
            return (splice(output[0]), *output[1:]) if isinstance(output, tuple) else splice(output)

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            if self.side == "hook_in":
                handle = self.module.register_forward_pre_hook(splice_input, with_kwargs=True)
            else:
                handle = self.module.register_forward_hook(splice_output)
            hooks.callback(handle.remove)
            output = self.transformer.base_model(input_ids=tokens, use_cache=False)
        return FinalStates(self.transformer, type(output), output.last_hidden_state.unflatten(0, (copies, batch)))


@dataclass(frozen=True)
class FinalStates:
    """Final states, which the unembedding reads: one copy of the batch for each replacement."""

    transformer: nn.Module
    kind: type
    """Class of the base model's output."""
    states: Tensor
    """`[copies, batch, position, d_model]`."""

    def of_copies(self, counted: Tensor) -> list[Tensor]:
        """States `[n, d_model]` of each copy at the chosen places `[batch, position - 1]`."""
        return [states[:, :-1][counted] for states in self.states]

    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits `[n, vocabulary]` of states `[n, d_model]`, with the model's own caps and scales."""
        output = self.kind(last_hidden_state=states.unsqueeze(0))
        with forward_of({self.transformer.base_model, self.transformer.get_decoder()}, lambda *_, **__: output):
            return self.transformer(inputs_embeds=states.unsqueeze(0), use_cache=False).logits[0].float()

    def check(self, tokens: Tensor) -> None:
        """Compare logits of the first text with those of an ordinary pass.

        Args:
            tokens: its first tokens `[1, position]`.

        Raises:
            BadInput: they differ, because the model's head reads something else.
        """
        expected = self.transformer(input_ids=tokens, use_cache=False).logits[0].float()
        found = self.logits(self.states[0, 0, : tokens.shape[1]])
        tolerance = 1e-3 if self.states.dtype == torch.float32 else 0.05
        if found.shape != expected.shape or (found - expected).abs().max() > tolerance * (1 + expected.abs().max()):
            name = type(self.transformer).__name__
            raise BadInput(f"subject: the logits of {name} cannot be made again from its final states")


@contextmanager
def forward_of(modules: set[nn.Module], forward: Callable) -> Iterator[None]:
    """Let modules compute something else meanwhile."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
