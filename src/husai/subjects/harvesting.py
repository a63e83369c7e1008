"""How a text becomes activations: what the files of an SAE say about those that it was trained on, and how a subject
makes them.

Names are SAELens' own. A value that no file gives is None. HUSAI's own way then stands: an input begins as the
tokenizer begins every text, it is as long as the model reads, and every position but 0 gives a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from husai.runs.errors import BadInput
from husai.runs.subjects import DTYPES, DType
from husai.subjects.hooks import canonical

KWARGS = "model_from_pretrained_kwargs"
CLASSES = ("HookedTransformer", "AutoModelForCausalLM", "TransformerBridge")
"""Classes of models whose activations HUSAI makes, in SAELens' names."""
ENDLESS = 2**62
UNKNOWN = "unknown"
OWN_WAY = "as HUSAI makes them"
DTYPE = ("dtype", "torch_dtype")
INERT = {
    *("revision", "checkpoint_value", *DTYPE),  # read by themselves
    *("device", "n_devices", "device_map", "move_to_device", "cache_dir", "local_files_only", "token", "n_ctx"),
    *("default_prepend_bos", "default_padding_side", "first_n_layers", "low_cpu_mem_usage", "use_safetensors"),
    *("trust_remote_code", "attn_implementation", "force_download"),
}
"""Keys of KWARGS that change no activation. SAELens gives its inputs as tokens, BOS included."""
STREAM = re.compile(
    r"(hook_embed|hook_pos_embed|pos_embed\.hook_out|ln_final\.hook_in"
    r"|blocks\.\d+\.(hook_resid_(pre|mid|post)|ln\d\.hook_in|hook_(attn|mlp)_out|(attn|mlp)\.hook_out"
    r"|attn\.hook_result))"
)
"""Hooks at which the residual stream passes, or what is written to it; names as `canonical` gives them."""
HEADS = re.compile(r"blocks\.\d+\.attn\.(hook_(z|q|k|v|rot_q|rot_k|result)|[qkv]\.hook_out)")
"""Hooks that hold one vector for each attention head."""
PROCESSED = {
    "fold_ln": re.compile(r"(ln\d?(_\w+)?|ln_final)\.hook_(normalized|out)$"),
    "fold_value_biases": re.compile(r"attn\.(hook_(v|z|result)|v\.hook_out)$"),
    "center_unembed": re.compile(r"unembed"),
    "refactor_factored_attn_matrices": re.compile(r"\battn\.(?!hook_(out|in|pattern|attn_scores)$)"),
}
"""Processing of weights by TransformerLens -> hooks at which it changes activations in a way that HUSAI does not
compute. At all other hooks it changes nothing."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
"""Special tokens of a tokenizer, as SAELens counts them (`sae_lens.util.get_special_token_ids`)."""


@dataclass(frozen=True)
class Harvesting:
    """How a text becomes activations."""

    prepend_bos: bool | None = None
    """Whether every input begins with the BOS token."""
    context_size: int | None = None
    """Most tokens of an input, BOS included."""
    seqpos_slice: tuple[int | None, ...] | None = None
    """Arguments of the `slice` of positions that give rows. Position 0 never does."""
    exclude_special_tokens: bool | tuple[int, ...] | None = None
    """Tokens that give no rows; True: the tokenizer's special ones."""
    hook_head_index: int | None = None
    """Number of the only attention head that is read."""
    center_writing_weights: bool | None = None
    """Whether the residual stream has mean 0 over its coordinates, as TransformerLens' processing leaves it."""
    autocast_lm: bool | None = None
    """Whether the model computes under autocast to bfloat16."""
    dtype: DType | None = None
    """Type of the model's weights."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    max_norm_multiple: float | None = None
    """Rows of stores whose norm exceeds this multiple of the median norm are left out (--max-norm-multiple)."""
    complete: bool = field(default=False, compare=False)
    """Whether None means HUSAI's own way, and not that no file says it: of an SAE that HUSAI trained."""

    def to_json(self) -> dict[str, Any]:
        """The values that are not None."""
        given = {name: getattr(self, name) for name in KEYS if getattr(self, name) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    def of_json(cls, given: dict[str, Any]) -> Harvesting:
        """The inverse of `to_json`."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return cls(**values)

    # -----------------------------------------------------------------------------------------------------------------
    # From the files of an SAE

    @classmethod
    def read(cls, metadata: dict[str, Any], hook_name: str, where: str) -> Harvesting:
        """Harvesting as the files of an SAE describe it.

        Args:
            metadata: `SAE.metadata` (`dictionaries.keys`). hook_name: the place that is read. where: names the SAE in
                messages.

        Raises:
            BadInput: a value that HUSAI cannot apply, naming its key.
        """
        ours = metadata.get("husai") or {}
        if "training" in ours:
            return replace(cls.of_json(ours.get("harvesting") or {}), complete=True)

        def value_of(key: str, good: Callable[[Any], bool], expected: str) -> Any:
            value = metadata.get(key)
            if value is not None and not good(value):
                raise BadInput(f"{where}: {key} is {value!r}; {expected} expected")
            return value

        value_of("model_class_name", lambda v: v in CLASSES, " or ".join(CLASSES))
        for key in ("use_chat_formatting", "load_in_8bit"):
            value_of(key, lambda v: v is False, "false, because HUSAI does not make activations so,")
        value_of("model_kwargs", lambda v: v == {}, "no argument of the forward pass")
        given = value_of(KWARGS, lambda v: isinstance(v, dict), "an object") or {}
        processing = _processing(given, canonical(hook_name), where)
        streams = STREAM.fullmatch(canonical(hook_name))  # elsewhere centring changes nothing

        context = None if metadata.get("context_size") == -1 else metadata.get("context_size")
        if context is not None and not _whole(context, 2):
            raise BadInput(f"{where}: context_size is {context!r}; a number of tokens, 2 at least, expected")
        positions = value_of("seqpos_slice", _is_slice, "[start, stop, step] of whole numbers or null")
        positions = None if positions is None else _positions(tuple(positions), context, where)
        special = value_of("exclude_special_tokens", _is_tokens, "true, false or numbers of tokens")
        head = value_of("hook_head_index", lambda v: _whole(v, 0), "the number of a head")
        if head is not None and not HEADS.fullmatch(canonical(hook_name)):
            raise BadInput(
                f"{where}: hook_head_index is {head}, and {hook_name} has no attention heads; a hook such as "
                "blocks.1.attn.hook_z expected as --hook-name"
            )
        return cls(
            prepend_bos=value_of("prepend_bos", lambda v: isinstance(v, bool), "true or false"),
            context_size=context,
            seqpos_slice=positions,
            exclude_special_tokens=tuple(sorted(special)) if isinstance(special, list | tuple) else special,
            hook_head_index=head,
            center_writing_weights=processing.get("center_writing_weights") if streams else None,
            autocast_lm=value_of("autocast_lm", lambda v: isinstance(v, bool), "true or false"),
            dtype=_dtype(given, where),
            revision=_revision(metadata, given, where),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # On a subject

    def on(self, tokenizer: Any, n_ctx: int, centred: bool | None) -> Harvesting:
        """Departures from HUSAI's own way on a subject; two that are equal make the same activations.

        Args:
            n_ctx: most tokens that the model reads.
            centred: whether TransformerLens centres the writing weights of such a model; None: it does, and the
                residual stream is not centred by it alone.

        Raises:
            BadInput: it cannot be done with this tokenizer or model.
        """
        if self.prepend_bos and bos_of(tokenizer) is None:
            raise BadInput(
                "checkpoint: prepend_bos is true, and the subject's tokenizer has neither BOS nor EOS token; the "
                "tokenizer that the SAE was trained with expected"
            )
        if self.center_writing_weights and centred is None:
            raise BadInput(
                "checkpoint: center_writing_weights is true; on a model of this architecture it is not the same as "
                "centring activations, which HUSAI computes; an SAE of unprocessed weights expected"
            )
        context = min(self.context_size or n_ctx, n_ctx)
        positions = self._positions(context)
        if not any(position > 0 for position in range(context)[slice(*positions or (None,))][:2]):
            raise BadInput(
                f"checkpoint: seqpos_slice {list(self.seqpos_slice or ())} leaves no position but 0 of {context} "
                "tokens; position 0 gives no row; more positions expected"
            )
        special = self.exclude_special_tokens
        if special is True:
            numbers = (getattr(tokenizer, name, None) for name in SPECIAL)
            special = tuple(sorted({number for number in numbers if number is not None}))
        begins = begins_of(tokenizer)
        return Harvesting(
            prepend_bos=None if self.prepend_bos in (None, bool(begins)) else self.prepend_bos,
            context_size=None if context == n_ctx else context,
            seqpos_slice=positions,
            exclude_special_tokens=special or None,
            hook_head_index=self.hook_head_index,
            center_writing_weights=bool(self.center_writing_weights and centred) or None,
            autocast_lm=self.autocast_lm or None,
            max_norm_multiple=self.max_norm_multiple,
        )

    def without_subject(self) -> Harvesting:
        """Departures from HUSAI's own way, as far as they can be told without the subject."""
        return Harvesting(
            seqpos_slice=self._positions(ENDLESS),
            exclude_special_tokens=self.exclude_special_tokens or None,
            hook_head_index=self.hook_head_index,
            center_writing_weights=self.center_writing_weights or None,
            autocast_lm=self.autocast_lm or None,
            max_norm_multiple=self.max_norm_multiple,
        )

    def _positions(self, context: int) -> tuple[int | None, ...] | None:
        """The slice of positions in one spelling; None where all but position 0 are in it."""
        start, stop, step = slice(*self.seqpos_slice or (None,)).indices(context)
        start = 1 if (start, step) == (0, 1) else start  # position 0 gives no row
        return None if (start, stop, step) == (1, context, 1) else (start, None if stop == context else stop, step)

    def begins(self, tokenizer: Any) -> list[int]:
        """Tokens before the first token of an input's text."""
        if self.prepend_bos is None:
            return begins_of(tokenizer)
        bos = bos_of(tokenizer)
        return [bos] if self.prepend_bos and bos is not None else []

    def encode(self, tokenizer: Any, texts: Sequence[str], n_ctx: int | None, side: str = "right") -> list[list[int]]:
        """Tokens of each text.

        Args:
            n_ctx: most tokens, None for all. side: where a longer text is cut.
        """
        if self.prepend_bos is None:
            tokenizer.truncation_side = side
            cut = {} if n_ctx is None else {"truncation": True, "max_length": n_ctx}
            return tokenizer(list(texts), **cut)["input_ids"]
        begins = self.begins(tokenizer)
        size = None if n_ctx is None else n_ctx - len(begins)
        chosen = slice(0, size) if size is None or side == "right" else slice(-size, None)
        return [[*begins, *ids[chosen]] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def kept(self, tokens: np.ndarray, first: int = 1) -> np.ndarray:
        """Positions of an input that give rows, bool `[len(tokens)]`.

        Args:
            first: the first position that may.
        """
        keep = np.zeros(len(tokens), bool)
        keep[slice(*self.seqpos_slice) if self.seqpos_slice else slice(None)] = True
        keep[:first] = False
        if self.exclude_special_tokens:
            keep &= ~np.isin(tokens, self.exclude_special_tokens)
        return keep

    def read_by_sae(self, x: Tensor, hook_name: str, heads: int) -> Tensor:
        """Input of an SAE at a hook.

        Args:
            x: `[…, d]`, heads side by side. heads: number of attention heads.
        """
        if self.hook_head_index is not None and HEADS.fullmatch(canonical(hook_name)):
            x = x[..., self._head(x, heads)]
        if self.center_writing_weights and STREAM.fullmatch(canonical(hook_name)):
            x = x - x.mean(-1, keepdim=True)
        return x

    def written(self, x: Tensor, made: Tensor, heads: int) -> Tensor:
        """A hook's output with what an SAE made in the place of what it read.

        The mean that centring took away stays away: LayerNorms, which read the residual stream, remove it anyway.
        """
        if self.hook_head_index is None:
            return made
        x = x.clone()
        x[..., self._head(x, heads)] = made.to(x.dtype)
        return x

    def _head(self, x: Tensor, heads: int) -> slice:
        assert self.hook_head_index is not None
        if self.hook_head_index >= heads or x.shape[-1] % heads:
            raise BadInput(f"checkpoint: hook_head_index is {self.hook_head_index}; the hook has {heads} heads")
        size = x.shape[-1] // heads
        return slice(self.hook_head_index * size, (self.hook_head_index + 1) * size)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context that the model runs in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=bool(self.autocast_lm))


KEYS = tuple(f.name for f in fields(Harvesting) if f.compare)
"""Names of the values, as SAELens has them."""


def begins_of(tokenizer: Any) -> list[int]:
    """Tokens that a tokenizer puts before every text, where they are the BOS token."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def bos_of(tokenizer: Any) -> int | None:
    """The BOS token. TransformerLens takes the EOS token where there is none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def agreed(said: Sequence[tuple[str, Harvesting]], flag: str) -> Harvesting:
    """How the activations of all these SAEs were made. An SAE whose files do not say a value goes with those that do.

    Args:
        said: (name of an SAE, what its files say).

    Raises:
        BadInput: two differ, naming the key and both values.
    """
    values: dict[str, tuple[str, Any]] = {}
    for name, harvesting in said:
        for key, value in harvesting.to_json().items():
            first, other = values.setdefault(key, (name, value))
            if other != value:
                raise BadInput(
                    f"{flag}: {key} is {other!r} in {first} and {value!r} in {name}; SAEs whose activations were made "
                    "alike expected"
                )
    found = Harvesting.of_json({key: value for key, (_, value) in values.items()})
    return replace(found, complete=bool(said) and all(harvesting.complete for _, harvesting in said))


def refuse_other(said: Harvesting, wanted: Harvesting, made: Harvesting, where: str) -> None:
    """Raise BadInput where an SAE's activations were made in another way than those at hand.

    Args:
        said: by its files. wanted: the same on the subject (`Harvesting.on`). made: those at hand, on the subject.
    """
    for name in KEYS:
        if name in ("dtype", "revision", "max_norm_multiple") or (getattr(said, name) is None and not said.complete):
            continue
        theirs, ours = getattr(wanted, name), getattr(made, name)
        if theirs is True and isinstance(ours, tuple):  # special tokens, whose numbers a subject gives
            continue
        if theirs != ours:
            asked = OWN_WAY if getattr(said, name) is None else f"{getattr(said, name)!r} by its files"
            have = OWN_WAY if ours is None else repr(ours)
            raise BadInput(
                f"{where}: {name} of its activations is {asked}, and {have} of those at hand; activations made alike "
                "expected"
            )


def recorded(said: Harvesting, subject: Any = None) -> dict[str, Any]:
    """Values that were applied, by key: `unknown` where no file says it and HUSAI's own way stands.

    Args:
        said: by the files of all SAEs. subject: the `LanguageModel` that makes their activations, where it is at hand.
    """
    applied = said.to_json()
    if subject is not None:
        departs = subject.harvesting
        applied |= {
            "context_size": subject.n_ctx,
            "exclude_special_tokens": list(departs.exclude_special_tokens or ()),
            "center_writing_weights": bool(departs.center_writing_weights),
            "dtype": subject.dtype,
        }
    found = {name: UNKNOWN if getattr(said, name) is None else applied[name] for name in KEYS}
    if subject is not None and subject.dtype != DTYPES[0]:
        found["dtype"] = subject.dtype  # by the files, or by --dtype
    for name in ("hook_head_index", "max_norm_multiple"):  # all heads and rows, in the libraries' files as here
        if getattr(said, name) is None:
            del found[name]
    return found


def line(found: dict[str, Any]) -> str:
    """The values of `recorded` in one line."""
    multiple = found.get("max_norm_multiple")
    given = [f"{name} {v}" for name, v in found.items() if v != UNKNOWN and name != "max_norm_multiple"]
    silent = [name for name, value in found.items() if value == UNKNOWN]
    said = f"as the files say: {', '.join(given)}" if given else "in HUSAI's own way"
    said = f"Activations {said}." + (f" The files do not say {', '.join(silent)}." if silent else "")
    return said + (f" Rows of more than {multiple:g} times the median norm are left out." if multiple else "")


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _processing(given: dict[str, Any], hook_name: str, where: str) -> dict[str, bool]:
    """How the model's weights were processed."""
    known = {"center_writing_weights", *PROCESSED}
    for key, value in sorted(given.items()):
        if key not in known | INERT:
            raise BadInput(f"{where}: {KWARGS}.{key} ({value!r}) is not known; it may change activations")
        if key in known and not isinstance(value, bool):
            raise BadInput(f"{where}: {KWARGS}.{key} is {value!r}; true or false expected")
        if key in PROCESSED and value and PROCESSED[key].search(hook_name):
            raise BadInput(
                f"{where}: {KWARGS}.{key} is true, which changes the activations at {hook_name} in a way that HUSAI "
                "does not compute; an SAE of unprocessed weights expected"
            )
    return {key: value for key, value in given.items() if key in known}


def _dtype(given: dict[str, Any], where: str) -> DType | None:
    values = {str(given[key]).removeprefix("torch.") for key in DTYPE if given.get(key) is not None}
    if len(values) > 1 or values - set(DTYPES):
        raise BadInput(
            f"{where}: {KWARGS}.dtype is {' and '.join(sorted(values))}; {' or '.join(DTYPES)}, in which HUSAI "
            "computes, expected"
        )
    return next((name for name in DTYPES if name in values), None)


def _revision(metadata: dict[str, Any], given: dict[str, Any], where: str) -> str | None:
    revision, value = metadata.get("revision") or given.get("revision"), given.get("checkpoint_value")
    if value is not None:
        if "pythia" not in str(metadata.get("model_name")).lower():
            raise BadInput(
                f"{where}: {KWARGS}.checkpoint_value is {value!r}, and only pythia's revisions are known by their "
                "step; a revision in its place expected"
            )
        revision = revision or f"step{value}"
    if revision is not None and (not isinstance(revision, str) or revision != (f"step{value}" if value else revision)):
        raise BadInput(f"{where}: revision is {revision!r} and checkpoint_value {value!r}; one revision expected")
    return revision


def _positions(given: tuple[int | None, ...], context: int | None, where: str) -> tuple[int | None, ...]:
    """Arguments of a slice that mean the same in inputs of any length."""
    if all(v is None or v >= 0 for v in given):
        return given
    if context is None:
        raise BadInput(
            f"{where}: seqpos_slice is {list(given)}, which counts from the end of an input of a length that the files "
            "do not say; context_size expected beside it"
        )
    return slice(*given).indices(context)


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_slice(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 3:
        return False
    return all(v is None or type(v) is int for v in value) and (len(value) < 3 or value[2] is None or value[2] > 0)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and all(_whole(v, 0) for v in value))
