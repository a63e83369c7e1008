"""Opens language models as subjects: husai-tiny, a local Hugging Face folder, or any name that TransformerLens knows.

A subject is opened by TransformerLens' bridge over transformers' own model, with the usual hook names
(`blocks.0.hook_resid_pre`). Weights stay as they were saved, without folding or centring.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from husai.evidence.levels import random_subject, random_weights
from husai.runs.errors import BadInput
from husai.runs.files import digest, read_json, sha256_file
from husai.runs.seeds import generator
from husai.runs.subjects import DTYPES, SHIPPED, DType, SubjectName, folder_of, hub_name, short_name
from husai.subjects.harvesting import Harvesting
from husai.subjects.hooks import hook_name_of, same_place

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OFFLINE = "husai-tiny, which the repository ships, or a local Hugging Face folder work without a network"
TOKENIZER = ("merges.txt", "vocab.json", "vocab.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model")
"""Files of a tokenizer beside `tokenizer*.json`."""
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
"""Names of the context length in configurations."""
DIGESTS = "digests.json"  # sha256 of each file, if the folder's author wrote them


@dataclass(frozen=True)
class LanguageModel:
    """An opened subject."""

    name: str  # names folders and files: husai-tiny, pythia-70m-deduped, husai-tiny-random0
    digest: str  # covers configuration, tokenizer, weights, dtype (unless float32), and draw of the control
    control: str | None  # how the weights were redrawn; None for the model itself
    model: TransformerBridge
    n_ctx: int
    """Largest number of tokens of an input."""
    transformer: torch.nn.Module
    """transformers' own model, without hooks and with its fastest attention. It shares parameters with `model`."""
    counterparts: dict[torch.nn.Module, torch.nn.Module]
    """Module of transformers inside `model` -> the same module of `transformer`."""

    dtype: DType
    """Type of weights and arithmetic."""
    known_as: str
    """OWNER/NAME, or NAME if the owner is unknown."""
    harvesting: Harvesting = field(default_factory=Harvesting)
    """Differences of its activations from HUSAI's own way."""

    @property
    def tokenizer(self):
        return self.model.tokenizer

    def same_place(self, one: str, other: str) -> bool:
        """True if two names mean one place in this model."""
        hooks, names = self.model.hook_dict, [hook_name_of(place) for place in (one, other)]
        return same_place(*names) or (names[0] in hooks and hooks[names[0]] is hooks.get(names[1]))

    @property
    def activations_digest(self) -> str:
        """Digest of the subject and of how its activations are made."""
        departs = self.harvesting.to_json()
        return digest([self.digest, departs]) if departs else self.digest

    def resolve(self, harvesting: Harvesting) -> Harvesting:
        """Differences of an SAE's activations from HUSAI's own way on this subject.

        Raises:
            BadInput: this model or tokenizer cannot make such activations.
        """
        return harvesting.on(self.tokenizer, context_of(self.transformer.config, self.name), centred(self.model))

    def heads(self, hook_name: str) -> int:
        """Number of concatenated attention heads at a hook."""
        config, of_keys = self.transformer.config, re.search(r"attn\.(hook_|rot_)?[kv](\.|$)", hook_name)
        heads = getattr(config, "num_attention_heads", 1)
        return (getattr(config, "num_key_value_heads", None) or heads) if of_keys else heads


def open_folder(name: str) -> Path:
    """Folder of a subject. A model with a hub name comes from the local cache, or is downloaded.

    Raises:
        BadInput: the folder or name does not exist, or the model cannot be downloaded.
    """
    if folder := folder_of(name):
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"subject: {folder} holds neither config.json (a Hugging Face folder) "
                "nor subject.json (modular addition)"
            )
        return folder
    subject = SubjectName.parse(name)
    name = subject.name
    if name in SHIPPED:
        raise BadInput(f"subject {name}: {SHIPPED[name]} is missing; the repository ships it")
    with quiet():
        from huggingface_hub import snapshot_download
        from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    official = official_name(name)
    if official not in OFFICIAL_MODEL_NAMES:
        raise BadInput(f"subject {name}: neither a folder nor a name that TransformerLens knows; {OFFLINE}")
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(official, revision=subject.revision, allow_patterns=patterns))
    except Exception as error:  # no network, no such repository, no right to read it
        revision = f" at revision {subject.revision}" if subject.revision else ""
        raise BadInput(
            f"subject {name}: {official}{revision} could not be downloaded ({type(error).__name__}); {OFFLINE}"
        ) from None


def official_name(name: str) -> str:
    """The hub's name of a model that is given by one of TransformerLens' aliases. Other names are unchanged."""
    with quiet():
        from transformer_lens.supported_models import MODEL_ALIASES

    return next((full for full, short in MODEL_ALIASES.items() if name in short), name)


def known_as(name: str | Path) -> str:
    """OWNER/NAME of a subject, or NAME if the owner is unknown."""
    return hub_name(name if folder_of(name) else official_name(SubjectName.parse(name).name))


def digest_of(name: str | Path) -> str:
    """Digest of a subject as opened by `load`. Does not open it."""
    sha, dtype = describe(open_folder(str(name))), SubjectName.parse(name).dtype
    return sha if dtype == DTYPES[0] else digest([sha, dtype])


def describe(folder: Path) -> str:
    """sha256 of the configuration, tokenizer and weights in a folder.

    Raises:
        BadInput: the folder holds no safetensors, or a file differs from its digest in digests.json.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BadInput(f"subject: {folder} holds no *.safetensors; weights of another format are not read")
    tokenizer = sorted({*folder.glob("tokenizer*.json"), *(folder / name for name in TOKENIZER)})
    files = [folder / "config.json", *tokenizer, *weights]
    digests = {p.name: sha256_file(p) for p in files if p.is_file()}
    if (folder / DIGESTS).exists():
        expected = read_json(folder / DIGESTS, "subject")["files"]
        changed = [n for n, sha in digests.items() if expected.get(n) != sha]
        if changed:
            raise BadInput(f"subject: {folder / changed[0]} is not the file that {DIGESTS} names (sha256 differs)")
    return digest(digests)


def context_of(config, subject: str | Path) -> int:
    """Context length of a model.

    Raises:
        BadInput: the configuration does not state it.
    """
    length = next((v for n in CONTEXT if type(v := getattr(config, n, None)) is int and v > 1), None)
    if length is None:
        raise BadInput(f"subject: {subject}: config.json says no context length; one of {', '.join(CONTEXT)} expected")
    return length


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int) -> None:
    """Replace every parameter by Gaussian numbers with the parameter's mean and variance: the random-weights control.

    Heap et al., "Sparse autoencoders can interpret randomly initialized transformers", arXiv 2501.17727. Only two
    numbers for each tensor remain of the training.
    """
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator(seed, "redraw", name))
        spread = p.float().std(correction=0) if p.numel() > 1 else torch.zeros(())
        p.copy_(noise.to(p.device) * spread + p.float().mean())


def tokenizer_of(name: str):
    """Tokenizer of a subject.

    Raises:
        BadInput: transformers cannot open it.
    """
    folder = open_folder(name)
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"subject {name}: transformers cannot open {folder} ({error})") from None


def load_transformers(name: str, random_seed: int | None = None):
    """The subject without hooks: (transformers' model in its dtype, its tokenizer, digest, control)."""
    folder = open_folder(name)
    sha, dtype = digest_of(name), getattr(torch, SubjectName.parse(name).dtype)
    control = None if random_seed is None else random_weights(random_seed)
    with quiet():
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"subject {name}: transformers cannot open {folder} ({error})") from None
    if random_seed is not None:
        redraw(model, random_seed)
    return model.eval(), tokenizer_of(name), sha if random_seed is None else random_subject(sha, random_seed), control


def load(
    name: str,
    random_seed: int | None = None,
    device: torch.device | str = "cpu",
    harvesting: Harvesting | None = None,
) -> LanguageModel:
    """Open a subject with its hooks.

    Args:
        name: `husai-tiny`, a Hugging Face folder, or a hub name as TransformerLens spells it, with optional revision
            and dtype (`runs.subjects.SubjectName`).
        random_seed: seed of the random-weights control (see `redraw`). None: the model's own weights.
        harvesting: how activations are made, as the files of SAEs state.

    Raises:
        BadInput: the subject does not exist or cannot be downloaded, or it cannot make such activations.
    """
    named = SubjectName.parse(name)
    model, tokenizer, sha, control = load_transformers(name, random_seed)
    transformer = sharing_parameters(model.to(device))
    counterparts = dict(zip(model.modules(), transformer.modules(), strict=True))  # before the bridge changes them
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(
            named.name, hf_model=model, tokenizer=tokenizer, device=str(device), dtype=model.dtype
        )
    short = short_name(name) + ("" if random_seed is None else f"-random{random_seed}")
    n_ctx = context_of(model.config, folder_of(name) or name)
    departs = (harvesting or Harvesting()).on(tokenizer, n_ctx, centred(bridge))
    n_ctx = departs.context_size or n_ctx
    facts = named.dtype, known_as(name), departs
    return LanguageModel(short, sha, control, bridge, n_ctx, transformer, counterparts, *facts)


def centred(bridge: TransformerBridge) -> bool | None:
    """True if TransformerLens' `center_writing_weights` centres a model's residual stream and changes nothing else.

    False: it does not change this model, because the model has no LayerNorm. None: it does not centre the stream fully,
    because a LayerNorm writes to the stream and its output keeps a mean.
    """
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    config = bridge.cfg
    if config.normalization_type not in ("LN", "LNPre") or getattr(config, "final_rms", False):
        return False
    alone = getattr(bridge.adapter, "supports_center_writing_weights", True)
    alone &= getattr(config, "original_architecture", None) not in POST_NORM_ARCHITECTURES
    return True if alone and "embed_ln" not in dict(bridge.named_children()) else None


def sharing_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """A second copy of the modules over the same parameters, with scaled-dot-product attention if it is supported."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    with contextlib.suppress(ValueError):  # some architectures have eager attention alone
        twin.set_attn_implementation("sdpa")
    return twin


@contextlib.contextmanager
def quiet():
    """Context without the messages that libraries print while they load."""
    logger = logging.getLogger()
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            logger.setLevel(level)
