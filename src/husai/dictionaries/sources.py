"""Opens checkpoints by name, and wraps SAELens' own objects as `SAE`.

    sae-lens:RELEASE/SAE_ID      an SAE of SAELens' catalogue, read by SAELens' own loader
    hf:REPO[@REVISION]/PATH      a checkpoint, or a folder of checkpoints, in a repository on the Hugging Face hub

A name is a `Path`, as every checkpoint is: `foreign.find_all`, `foreign.open_checkpoint` and
`foreign.checkpoint_sha256` take paths and names. Files come from the local hub cache. HUSAI downloads files that the
cache lacks, because the user named them. Files of one repository come from one commit. Downloaded code cannot run:
pickles are read weights-only, in SAELens' loaders too, and no path leaves its repository.
"""

from __future__ import annotations

import copy
import difflib
import glob
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from husai.dictionaries.sae import ARCHITECTURES, ENCODER, SAE
from husai.runs.checkpoints import CATALOGUE, HUB
from husai.runs.errors import BadInput
from husai.runs.files import digest, sha256_file

REPOSITORY = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inside>.*))?")
DOWNLOADED = ("*.json", "*.safetensors", "*.pt", "*.pth", "*.npz")
"""Names of the files that a checkpoint may consist of."""
GEMMA_SCOPE = "params.npz"
WEIGHTS = {".safetensors", ".pt", ".pth", ".npz"}

_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


@contextmanager
def cached_only() -> Iterator[None]:
    """Context in which names are read from the local hub cache alone, because a file and not the user gave them."""
    token = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# The hub


_LOCATED: dict[tuple[str, Path], tuple[Path, Path]] = {}
"""(hub cache, name) -> (snapshot, file or folder in it). The hub is asked once about each name."""


def local(name: Path, flag: str = "checkpoint") -> Path:
    """File or folder in the local hub cache that `hf:REPO[@REVISION]/PATH` names. Any other path is returned unchanged.

    Raises:
        BadInput: the name is malformed or leaves its repository, or the file is not cached and cannot be downloaded.
    """
    return _locate(name, flag)[1] if str(name).startswith(HUB) else name


def pinned(name: Path, place: Path, flag: str = "checkpoint") -> Path:
    """Name of a checkpoint at or below `name`, with the commit that it is read from.

    Args:
        place: the checkpoint in the local hub cache.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshot, _ = _locate(name, flag)
    repo = _parse(name, flag)[0]
    pinned_name = Path(f"{HUB}{repo}@{snapshot.name}", place.relative_to(snapshot))
    _LOCATED[HF_HUB_CACHE, pinned_name] = snapshot, _inside(place, snapshot, pinned_name)
    return pinned_name


def _parse(name: Path, flag: str) -> tuple[str, str | None, str]:
    """(repository, revision, path inside) of `hf:REPO[@REVISION]/PATH`."""
    match = REPOSITORY.fullmatch(str(name))
    parts = Path(match["inside"] or ".").parts if match else ()
    if match is None or ".." in (*parts, match["revision"]) or ".." in match["repo"]:
        raise BadInput(f"{flag}: {name} is no name of a file on the hub; hf:OWNER/REPOSITORY[@REVISION]/PATH expected")
    return match["repo"], match["revision"], "/".join(parts)


def _locate(name: Path, flag: str) -> tuple[Path, Path]:
    """(folder of the repository's snapshot, file or folder in it)."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if (HF_HUB_CACHE, name) in _LOCATED:
        return _LOCATED[HF_HUB_CACHE, name]
    repo, revision, inside = _parse(name, flag)
    patterns = [f"{glob.escape(inside)}/{n}" if inside else n for n in DOWNLOADED]
    if inside:  # a file, and the JSON files beside it
        patterns += [glob.escape(inside), f"{glob.escape(str(Path(inside).parent))}/*.json".removeprefix("./")]
    try:
        snapshot = _snapshot(repo, revision, patterns)
    except Exception as error:  # the hub's client raises many types of exceptions
        raise BadInput(f"{flag}: {name} {_unavailable(error)}") from None
    path = snapshot / inside
    if not path.exists():
        raise BadInput(
            f"{flag}: {name} is not at commit {snapshot.name[:12]} of the repository, as far as the local hub cache "
            f"{HF_HUB_CACHE} or the hub says; a path inside the repository expected"
        )
    _LOCATED[HF_HUB_CACHE, name] = snapshot, _inside(path, snapshot, name)
    return snapshot, path


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Folder of a repository's snapshot with the matching files, at the cached commit if there is one.

    The hub's client completes an interrupted download. Without a network it returns the cached folder, unless it knows
    that a file is missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / (revision or "main")
    commit = cached.read_text().strip() if cached.is_file() else revision
    only = not _downloads.get()
    with _quiet():
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns, local_files_only=only))


def _fetch(fetched: list[Path], repo_id: str, filename: str, subfolder: str | None = None, **more: Any) -> str:
    """`hf_hub_download` for SAELens' loaders: the cached file, else a download from the cached commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    filename, revision = f"{subfolder}/{filename}" if subfolder else filename, more.get("revision")
    if ".." in Path(filename).parts or Path(filename).is_absolute():
        raise BadInput(f"checkpoint: {filename} leaves the repository {repo_id}")
    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        if not _downloads.get():
            raise LocalEntryNotFoundError(f"{repo_id}: {filename}") from None
        path = _snapshot(repo_id, revision, [glob.escape(filename)]) / filename
        if not path.is_file():
            raise EntryNotFoundError(f"{repo_id} has no {filename}, or the hub cannot be reached") from None
    snapshot = path.parents[len(Path(filename).parts) - 1]
    fetched.append(_inside(path, snapshot, Path(filename)))
    return str(path)


def _inside(path: Path, snapshot: Path, name: Path) -> Path:
    """`path`. Raises BadInput if a link leads out of the repository's part of the cache."""
    if not path.resolve().is_relative_to(snapshot.parents[1].resolve()):
        raise BadInput(f"checkpoint: {name} leads out of its repository, to {path.resolve()}")
    return path


def _unavailable(error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError

    why = (
        "no network" if isinstance(error, LocalEntryNotFoundError) else f"{type(error).__name__}: {_first_line(error)}"
    )
    return (
        f"is not in the local hub cache {HF_HUB_CACHE} and cannot be downloaded ({why}); run the same command on a "
        "machine with a network first, or give a local folder"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the hub client's messages on retries and fallbacks."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------------------------------------
# SAELens' catalogue

_WEIGHTS_OF: dict[Path, list[Path]] = {}
"""Name -> weights files that SAELens' loader read."""


def open_named(name: Path, flag: str = "checkpoint") -> SAE:
    """Open an SAE of SAELens' catalogue.

    Raises:
        BadInput: the SAE does not exist, is not cached and cannot be downloaded, is damaged, its file holds more than
            weights, or HUSAI cannot compute its map.
    """
    release, sae_id = refuse_unknown(name, flag)
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
    from sae_lens import SAE as Peer
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name

    loaders, fetched = loaders_that_run_nothing()
    converter = loaders.NAMED_PRETRAINED_SAE_LOADERS[get_conversion_loader_name(release)]
    try:
        with warnings.catch_warnings(action="ignore"):  # `behind` refuses settings that matter
            peer, *_ = Peer.from_pretrained_with_cfg_and_sparsity(release, sae_id, converter=converter)
    except BadInput as error:
        raise BadInput(f"{flag}: {name}: {error}") from None
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise BadInput(f"{flag}: {name} {_unavailable(error)}") from None
    except Exception as error:  # damaged or foreign files raise various errors
        raise BadInput(f"{flag}: {name}: {_unreadable(error)}") from None
    _WEIGHTS_OF[name] = [p for p in fetched if p.suffix in WEIGHTS and p.name != "sparsity.safetensors"]
    return behind(peer, f"{flag}: {name}")


def weights_of(name: Path) -> list[Path]:
    """Weights files of an SAE of the catalogue."""
    if name not in _WEIGHTS_OF:
        open_named(name)
    return _WEIGHTS_OF[name]


def sha256_of(name: Path) -> str:
    """sha256 that names the weights of an SAE of the catalogue: of its file, or of all its files' sha256."""
    digests = [sha256_file(path) for path in weights_of(name)]
    return digests[0] if len(digests) == 1 else digest(digests)


def refuse_unknown(name: Path, flag: str = "checkpoint") -> tuple[str, str]:
    """(release, id) of an SAE of the catalogue. Raises BadInput if the catalogue lacks it."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, _, sae_id = str(name).removeprefix(CATALOGUE).partition("/")
    catalogue = get_pretrained_saes_directory()
    known, part = (catalogue, release) if release not in catalogue else (catalogue[release].saes_map, sae_id)
    if part not in known:
        near = difflib.get_close_matches(part, known, 3) or sorted(known)[:3]
        kind = "id of its release" if release in catalogue else "release"
        raise BadInput(
            f"{flag}: {name}: {part!r} is no {kind} in SAELens' catalogue; one such as {', '.join(near)} expected "
            "(scripts/analysis/list_saes.py prints all)"
        )
    return release, sae_id


def loaders_that_run_nothing() -> tuple[Any, list[Path]]:
    """(SAELens' loaders, list that collects the files that they fetch).

    The module is a copy of `sae_lens.loading.pretrained_sae_loaders` with replaced input functions: files come from
    `_fetch`, shapes come from cached files instead of HTTP, and pickles are read weights-only in every environment.
    """
    import numpy

    spec = importlib.util.find_spec("sae_lens.loading.pretrained_sae_loaders")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fetched: list[Path] = []
    module.hf_hub_download = fetch = partial(_fetch, fetched)
    module.get_safetensors_tensor_shapes = lambda repo_id, filename: _shapes(fetch(repo_id, filename))
    module.torch = SimpleNamespace(**vars(torch) | {"load": partial(torch.load, weights_only=True)})
    module.np = SimpleNamespace(**vars(numpy) | {"load": partial(numpy.load, allow_pickle=False)})
    return module, fetched


def _shapes(path: str) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _unreadable(error: Exception, reader: str = "SAELens") -> str:
    """Meaning of a loader's error, in one line."""
    if type(error).__name__ == "UnpicklingError" or "allow_pickle" in str(error):
        return "its file holds more than tensors and plain values, which could run code"
    return f"{reader} cannot read it ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "cut off")


# ---------------------------------------------------------------------------------------------------------------------
# SAELens' objects

REFUSED = {
    "temporal": "its features of a token depend on the tokens before it; HUSAI judges codes of single rows",
    "abstopk": "its features may be negative; HUSAI counts a feature as active where it is above 0",
    "expected_average_only_in": "its activations were scaled by a mean norm that neither the checkpoint nor the "
    "catalogue gives; fold the scale into its weights first",
    "covariance_whitening": "its activations were whitened by matrices that the checkpoint does not hold; fold them "
    "into its weights first",
}
"""Architecture or scaling of activations -> why HUSAI cannot compute it soundly."""
BY_ROW = ("layer_norm", "constant_norm_rescale")
"""Scalings by statistics of the row itself, which decode reverts."""


def beyond_formulas(config: dict) -> bool:
    """True if a `cfg.json` of SAELens describes an SAE that only SAELens' own object can compute."""
    values = [config.get(key) for key in ("architecture", "normalize_activations", "reshape_activations")]
    beyond = (*BY_ROW, "hook_z", "matching_pursuit", "temporal", "abstopk", "covariance_whitening")
    before_6 = not {"reshape_activations", "metadata"} & set(config)  # SAELens then recognises heads by the hook's name
    heads = before_6 and "hook_z" in str(config.get("hook_name") or config.get("hook_point"))
    return heads or any(value in beyond for value in values)


def open_folder(folder: Path) -> SAE:
    """Open a folder in SAELens' layout by SAELens' own code.

    Raises:
        BadInput: the folder is damaged, or HUSAI cannot compute the SAE's map.
    """
    from sae_lens import SAE as Peer

    loaders, _ = loaders_that_run_nothing()
    try:
        with warnings.catch_warnings(action="ignore"):
            peer = Peer.load_from_disk(folder, dtype="float32", converter=loaders.sae_lens_disk_loader)
    except Exception as error:  # as in `open_named`
        raise BadInput(f"checkpoint: {folder}: {_unreadable(error)}") from None
    return behind(peer, f"checkpoint: {folder}")


def behind(peer: Any, location: str) -> SAE:
    """SAELens' object as an `SAE`: by its weights if HUSAI's formulas compute the same map, else by the object itself.

    Raises:
        BadInput: HUSAI cannot judge such an SAE.
    """
    config = peer.cfg
    architecture, scaling = config.architecture(), config.normalize_activations
    for setting in (architecture, scaling):
        if setting in REFUSED:
            raise BadInput(f"{location}: {setting}: {REFUSED[setting]}")
    if getattr(config, "rescale_acts_by_decoder_norm", False):
        peer.fold_W_dec_norm()
    peer.requires_grad_(False)
    weights = {name: tensor.detach() for name, tensor in peer.state_dict().items()}
    weights.setdefault("W_enc", weights["W_dec"].T)  # a matching pursuit encodes with its decoder
    metadata = {key: value for key, value in config.metadata.to_dict().items() if value is not None}
    subtract = config.apply_b_dec_to_input and "transcoder" not in architecture
    sae = SAE(weights, architecture, getattr(config, "k", None), subtract, metadata)
    if architecture in ARCHITECTURES and scaling == "none" and config.reshape_activations == "none":
        return sae
    return PeerSAE(**vars(sae), peer=peer)


@dataclass
class PeerSAE(SAE):
    """An SAE that SAELens computes, because the formulas of `SAE` do not cover it. Attention heads are flattened."""

    peer: Any = None
    """SAELens' object."""

    def __post_init__(self) -> None:
        self.peer.turn_off_forward_pass_hook_z_reshaping()

    @property
    def computes(self) -> dict:
        """Settings that affect encode or decode."""
        config = self.peer.cfg.to_dict()
        return {k: v for k, v in config.items() if k not in ("metadata", "device", "dtype", "d_in", "d_sae")}

    def unit(self) -> None:
        """Scale decoder rows to norm 1, or a TopK SAE's rows to median norm 1 (`checkpoints.unit_decoder`)."""
        architecture = self.peer.cfg.architecture()
        if architecture == "topk":
            norms = self.peer.W_dec.norm(dim=1)
            factor = norms[norms > 0].median()
            for name, by in (("W_enc", factor), ("b_enc", factor), ("W_dec", 1 / factor)):
                getattr(self.peer, name).data.mul_(by)
        elif architecture in ARCHITECTURES:
            self.peer.fold_W_dec_norm()
        else:
            return
        self.weights = {name: tensor.detach() for name, tensor in self.peer.state_dict().items()}

    def to(self, device: torch.device | str) -> PeerSAE:
        """The same SAE on another device."""
        weights = {name: tensor.to(device) for name, tensor in self.weights.items()}
        return replace(self, weights=weights, peer=copy.deepcopy(self.peer).to(device))

    def encode(self, x: Tensor) -> Tensor:
        """`x [rows, d_in]` -> features `[rows, d_sae]`."""
        return self.peer.encode(x)

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """features `[rows, d_sae]` -> `[rows, d_out]`.

        If the SAE scales rows by their own statistics, decode restores the scale of `x [rows, d_in]`.
        """
        if self.peer.cfg.normalize_activations in BY_ROW:
            if x is None:
                raise ValueError("decode needs the rows that were encoded")
            self.peer.run_time_activation_norm_fn_in(x)  # stores the rows' statistics, which decode reverts
        return self.peer.decode(features)

    def saved(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, `cfg.json`) in SAELens' layout."""
        state = self.peer.state_dict()
        self.peer.process_state_dict_for_saving(state)
        return {name: tensor.cpu().contiguous() for name, tensor in state.items()}, self.peer.cfg.to_dict()


# ---------------------------------------------------------------------------------------------------------------------
# Gemma Scope, outside the catalogue


def open_gemma_scope(folder: Path) -> SAE:
    """Open `params.npz` of Gemma Scope: a JumpReLU SAE that subtracts nothing from its input.

    The names of its folders give model and hook, as SAELens reads them.

    Raises:
        BadInput: the file is damaged, or holds more than arrays of numbers.
    """
    import numpy

    path = folder / GEMMA_SCOPE
    try:
        with open(path, "rb") as file, numpy.load(file, allow_pickle=False) as arrays:
            weights = {re.sub("^w_", "W_", n): torch.from_numpy(arrays[n]).float() for n in arrays}
    except Exception as error:  # damaged archives raise various errors in numpy and zipfile
        raise BadInput(f"checkpoint: {path}: {_unreadable(error, 'numpy')}") from None
    names = (*ENCODER["jumprelu"], "W_dec", "b_dec")
    if set(weights) != set(names) or weights["W_enc"].ndim != 2 or weights["W_dec"].ndim != 2:
        raise BadInput(f"checkpoint: {path} holds {sorted(weights)}; the matrices and vectors {names} expected")
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    shapes = dict.fromkeys(names, (d_sae,)) | {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if {n: tuple(t.shape) for n, t in weights.items()} != shapes:
        raise BadInput(f"checkpoint: {path}: its tensors do not fit each other; {shapes} expected")
    architecture, metadata = _gemma_scope_config(folder.absolute())
    if "embedding" in folder.absolute().parts:  # trained on embeddings times √d_in, as Gemma computes them
        weights |= {"W_enc": weights["W_enc"] / d_in**0.5, "W_dec": weights["W_dec"] * d_in**0.5}
    return SAE(weights, architecture, None, False, metadata)


def _gemma_scope_config(folder: Path) -> tuple[str, dict]:
    """(architecture, metadata) of `…/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`.

    A folder must have the repository's name. Other names give no model and hook.
    """
    at = next((i for i, part in enumerate(folder.parts) if re.search(r"(^|--)gemma-scope-\d+b-", part)), None)
    if at is None:
        return "jumprelu", {}
    repo, inside = folder.parts[at], folder.parts[at + 1 :]
    inside = inside[2:] if inside[:1] == ("snapshots",) else inside
    loaders, _ = loaders_that_run_nothing()
    kind = "gemma_2_transcoder" if "transcoder" in repo else "gemma_2"
    try:
        config = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[kind](repo, "/".join(inside), "cpu")
    except ValueError as error:
        raise BadInput(f"checkpoint: {folder}: its name is none of Gemma Scope's ({error})") from None
    metadata = {key: config[key] for key in sorted(loaders.LLM_METADATA_KEYS & set(config))}
    return config["architecture"], {k: v for k, v in metadata.items() if v is not None}
