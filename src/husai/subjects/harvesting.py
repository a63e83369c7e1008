"""Settings by which a text becomes activations: read from an SAE's files, and applied to a subject.

Names are SAELens' own. A value that no file states is None, and HUSAI then uses its own way: an input begins as the
tokenizer begins every text, it is as long as the model's context, and every position except 0 gives a row.
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
"""Model classes, in SAELens' names, whose activations HUSAI can make."""
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
"""Keys of KWARGS that change no activation. SAELens passes inputs as tokens, including BOS."""
STREAM = re.compile(
    r"(hook_embed|hook_pos_embed|pos_embed\.hook_out|ln_final\.hook_in"
    r"|blocks\.\d+\.(hook_resid_(pre|mid|post)|ln\d\.hook_in|hook_(attn|mlp)_out|(attn|mlp)\.hook_out"
    r"|attn\.hook_result))"
)
"""Hooks of the residual stream, or of outputs that are added to it; names as `canonical` gives them."""
HEADS = re.compile(r"blocks\.\d+\.attn\.(hook_(z|q|k|v|rot_q|rot_k|result)|[qkv]\.hook_out)")
"""Hooks with one vector for each attention head."""
PROCESSED = {
    "fold_ln": re.compile(r"(ln\d?(_\w+)?|ln_final)\.hook_(normalized|out)$"),
    "fold_value_biases": re.compile(r"attn\.(hook_(v|z|result)|v\.hook_out)$"),
    "center_unembed": re.compile(r"unembed"),
    "refactor_factored_attn_matrices": re.compile(r"\battn\.(?!hook_(out|in|pattern|attn_scores)$)"),
}
"""Processing of weights by TransformerLens -> hooks whose activations it changes in a way that HUSAI does not compute.
At all other hooks it changes nothing."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
"""Special tokens of a tokenizer, as SAELens counts them (`sae_lens.util.get_special_token_ids`)."""


@dataclass(frozen=True)
class Harvesting:
    """Settings by which a text becomes activations."""

    prepend_bos: bool | None = None
    """Whether every input begins with the BOS token."""
    context_size: int | None = None
    """Largest number of tokens of an input, including BOS."""
    seqpos_slice: tuple[int | None, ...] | None = None
    """Arguments of the `slice` of positions that give rows. Position 0 never gives a row."""
    exclude_special_tokens: bool | tuple[int, ...] | None = None
    """Tokens that give no rows. True: the tokenizer's special tokens."""
    hook_head_index: int | None = None
    """Number of the attention head that the SAE reads. None: all heads."""
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
    """Whether None means HUSAI's own way, as for SAEs that HUSAI trained, instead of an unknown value."""

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
    def read(cls, metadata: dict[str, Any], hook_name: str, checkpoint: str) -> Harvesting:
        """Harvesting as the files of an SAE describe it.

        Args:
            metadata: `SAE.metadata` (`dictionaries.keys`). hook_name: hook that the SAE reads.
            checkpoint: name of the SAE in messages.

        Raises:
            BadInput: HUSAI cannot apply a value; the message names its key.
        """
        husai = metadata.get("husai") or {}
        if "training" in husai:
            return replace(cls.of_json(husai.get("harvesting") or {}), complete=True)

        def value_of(key: str, good: Callable[[Any], bool], expected: str) -> Any:
            value = metadata.get(key)
            if value is not None and not good(value):
                raise BadInput(f"{checkpoint}: {key} is {value!r}; {expected} expected")
            return value

        value_of("model_class_name", lambda v: v in CLASSES, " or ".join(CLASSES))
        for key in ("use_chat_formatting", "load_in_8bit"):
            value_of(key, lambda v: v is False, "false, because HUSAI does not make activations so,")
        value_of("model_kwargs", lambda v: v == {}, "no argument of the forward pass")
        given = value_of(KWARGS, lambda v: isinstance(v, dict), "an object") or {}
        processing = _processing(given, canonical(hook_name), checkpoint)
        streams = STREAM.fullmatch(canonical(hook_name))  # elsewhere centring changes nothing

        context = None if metadata.get("context_size") == -1 else metadata.get("context_size")
        if context is not None and not _whole(context, 2):
            raise BadInput(f"{checkpoint}: context_size is {context!r}; a number of tokens, 2 at least, expected")
        positions = value_of("seqpos_slice", _is_slice, "[start, stop, step] of whole numbers or null")
        positions = None if positions is None else _positions(tuple(positions), context, checkpoint)
        special = value_of("exclude_special_tokens", _is_tokens, "true, false or numbers of tokens")
        head = value_of("hook_head_index", lambda v: _whole(v, 0), "the number of a head")
        if head is not None and not HEADS.fullmatch(canonical(hook_name)):
            raise BadInput(
                f"{checkpoint}: hook_head_index is {head}, and {hook_name} has no attention heads; a hook such as "
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
            dtype=_dtype(given, checkpoint),
            revision=_revision(metadata, given, checkpoint),
        )

    # -----------------------------------------------------------------------------------------------------------------
    # On a subject

    def on(self, tokenizer: Any, n_ctx: int, centred: bool | None) -> Harvesting:
        """Differences from HUSAI's own way on a subject. Equal results make equal activations.

        Args:
            n_ctx: context length of the model.
            centred: whether TransformerLens centres the writing weights of this model. None: it does, but this does
                not centre the residual stream.

        Raises:
            BadInput: this tokenizer or model does not support the settings.
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
        """Differences from HUSAI's own way, as far as they are known without the subject."""
        return Harvesting(
            seqpos_slice=self._positions(ENDLESS),
            exclude_special_tokens=self.exclude_special_tokens or None,
            hook_head_index=self.hook_head_index,
            center_writing_weights=self.center_writing_weights or None,
            autocast_lm=self.autocast_lm or None,
            max_norm_multiple=self.max_norm_multiple,
        )

    def _positions(self, context: int) -> tuple[int | None, ...] | None:
        """The slice of positions in a canonical form; None if it holds all positions except 0."""
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
            n_ctx: largest number of tokens; None for all. side: end at which a longer text is cut.
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
            first: first position that may give a row.
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
            x: activations `[…, d]`, heads concatenated. heads: number of attention heads.
        """
        if self.hook_head_index is not None and HEADS.fullmatch(canonical(hook_name)):
            x = x[..., self._head(x, heads)]
        if self.center_writing_weights and STREAM.fullmatch(canonical(hook_name)):
            x = x - x.mean(-1, keepdim=True)
        return x

    def written(self, x: Tensor, made: Tensor, heads: int) -> Tensor:
        """A hook's output with an SAE's reconstruction `made` in place of the SAE's input.

        The mean that centring removed is not added again, because the LayerNorms that read the residual stream remove
        it.
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
        """Context manager in which the model runs."""
        return torch.autocast(device.type, torch.bfloat16, enabled=bool(self.autocast_lm))


KEYS = tuple(f.name for f in fields(Harvesting) if f.compare)
"""Names of the values, as SAELens has them."""


def begins_of(tokenizer: Any) -> list[int]:
    """The BOS token, if the tokenizer puts it before every text; else no token."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def bos_of(tokenizer: Any) -> int | None:
    """The BOS token, or the EOS token if there is no BOS token, as in TransformerLens."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def agreed(stated_by_sae: Sequence[tuple[str, Harvesting]], flag: str) -> Harvesting:
    """Common settings of several SAEs. A value that the files of one SAE state holds for all of them.

    Args:
        stated_by_sae: (name of an SAE, settings in its files).

    Raises:
        BadInput: two SAEs differ; the message names the key and both values.
    """
    values: dict[str, tuple[str, Any]] = {}
    for name, harvesting in stated_by_sae:
        for key, value in harvesting.to_json().items():
            first, other = values.setdefault(key, (name, value))
            if other != value:
                raise BadInput(
                    f"{flag}: {key} is {other!r} in {first} and {value!r} in {name}; SAEs whose activations were made "
                    "alike expected"
                )
    common = Harvesting.of_json({key: value for key, (_, value) in values.items()})
    return replace(common, complete=bool(stated_by_sae) and all(harvesting.complete for _, harvesting in stated_by_sae))


def refuse_other(stated: Harvesting, needed: Harvesting, present: Harvesting, checkpoint: str) -> None:
    """Raise BadInput if an SAE's activations were made in another way than the present ones.

    Args:
        stated: settings in the SAE's files. needed: these settings on the subject (`Harvesting.on`).
        present: settings of the present activations. checkpoint: name of the SAE in messages.
    """
    for name in KEYS:
        if name in ("dtype", "revision", "max_norm_multiple") or (
            getattr(stated, name) is None and not stated.complete
        ):
            continue
        needed_value, present_value = getattr(needed, name), getattr(present, name)
        if needed_value is True and isinstance(present_value, tuple):  # special tokens, whose numbers a subject gives
            continue
        if needed_value != present_value:
            required = OWN_WAY if getattr(stated, name) is None else f"{getattr(stated, name)!r} by its files"
            available = OWN_WAY if present_value is None else repr(present_value)
            raise BadInput(
                f"{checkpoint}: {name} of its activations is {required}, and {available} of the available ones; "
                "activations made alike expected"
            )


def recorded(stated: Harvesting, subject: Any = None) -> dict[str, Any]:
    """Key -> applied value, or `unknown` if no file states the value and HUSAI used its own.

    Args:
        stated: settings in the files of all SAEs.
        subject: the `LanguageModel` that makes the activations; None if it is not loaded.
    """
    applied = stated.to_json()
    if subject is not None:
        departs = subject.harvesting
        applied |= {
            "context_size": subject.n_ctx,
            "exclude_special_tokens": list(departs.exclude_special_tokens or ()),
            "center_writing_weights": bool(departs.center_writing_weights),
            "dtype": subject.dtype,
        }
    values = {name: UNKNOWN if getattr(stated, name) is None else applied[name] for name in KEYS}
    if subject is not None and subject.dtype != DTYPES[0]:
        values["dtype"] = subject.dtype  # by the files, or by --dtype
    for name in ("hook_head_index", "max_norm_multiple"):  # all heads and rows, in the libraries' files as here
        if getattr(stated, name) is None:
            del values[name]
    return values


def line(values: dict[str, Any]) -> str:
    """The values of `recorded` as one line of text."""
    multiple = values.get("max_norm_multiple")
    given = [f"{name} {v}" for name, v in values.items() if v != UNKNOWN and name != "max_norm_multiple"]
    silent = [name for name, value in values.items() if value == UNKNOWN]
    sentence = f"as the files say: {', '.join(given)}" if given else "in HUSAI's own way"
    sentence = f"Activations {sentence}." + (f" The files do not say {', '.join(silent)}." if silent else "")
    return sentence + (f" Rows of more than {multiple:g} times the median norm are left out." if multiple else "")


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _processing(given: dict[str, Any], hook_name: str, checkpoint: str) -> dict[str, bool]:
    """Key -> whether TransformerLens processed the model's weights in this way."""
    known = {"center_writing_weights", *PROCESSED}
    for key, value in sorted(given.items()):
        if key not in known | INERT:
            raise BadInput(f"{checkpoint}: {KWARGS}.{key} ({value!r}) is not known; it may change activations")
        if key in known and not isinstance(value, bool):
            raise BadInput(f"{checkpoint}: {KWARGS}.{key} is {value!r}; true or false expected")
        if key in PROCESSED and value and PROCESSED[key].search(hook_name):
            raise BadInput(
                f"{checkpoint}: {KWARGS}.{key} is true, which changes the activations at {hook_name} in a way that "
                "HUSAI does not compute; an SAE of unprocessed weights expected"
            )
    return {key: value for key, value in given.items() if key in known}


def _dtype(given: dict[str, Any], checkpoint: str) -> DType | None:
    values = {str(given[key]).removeprefix("torch.") for key in DTYPE if given.get(key) is not None}
    if len(values) > 1 or values - set(DTYPES):
        raise BadInput(
            f"{checkpoint}: {KWARGS}.dtype is {' and '.join(sorted(values))}; {' or '.join(DTYPES)}, in which HUSAI "
            "computes, expected"
        )
    return next((name for name in DTYPES if name in values), None)


def _revision(metadata: dict[str, Any], given: dict[str, Any], checkpoint: str) -> str | None:
    revision, value = metadata.get("revision") or given.get("revision"), given.get("checkpoint_value")
    if value is not None:
        if "pythia" not in str(metadata.get("model_name")).lower():
            raise BadInput(
                f"{checkpoint}: {KWARGS}.checkpoint_value is {value!r}, and only pythia's revisions are known by their "
                "step; a revision in its place expected"
            )
        revision = revision or f"step{value}"
    if revision is not None and (not isinstance(revision, str) or revision != (f"step{value}" if value else revision)):
        raise BadInput(f"{checkpoint}: revision is {revision!r} and checkpoint_value {value!r}; one revision expected")
    return revision


def _positions(given: tuple[int | None, ...], context: int | None, checkpoint: str) -> tuple[int | None, ...]:
    """Arguments of a slice that have the same meaning for inputs of any length."""
    if all(v is None or v >= 0 for v in given):
        return given
    if context is None:
        raise BadInput(
            f"{checkpoint}: seqpos_slice is {list(given)}, which counts from the end of an input of a length that the "
            "files do not say; context_size expected beside it"
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
