"""Checkpoints by name, read offline from imitations in a local hub cache, against SAELens' own objects."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import imitations
from husai.dictionaries import foreign, sources
from husai.dictionaries.sae import SAE
from husai.runs.errors import BadInput
from imitations import IMITATIONS, Imitation

X = torch.randn(40, imitations.D_IN, generator=torch.Generator().manual_seed(1)) * 2
TEMPORAL = [i for i in IMITATIONS if i.loader == "temporal"]
READ = [i for i in IMITATIONS if i.loader != "temporal"]
named = pytest.mark.parametrize("imitation", READ, ids=lambda i: f"{i.loader}-{i.release}-{i.sae_id[-9:]}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "_WEIGHTS_OF", {})
    return tmp_path / "hub"


@pytest.fixture
def put(cache, monkeypatch):
    """`put(imitation)` puts its files into the cache, and its sizes into the catalogue's overrides."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    def write(imitation: Imitation) -> Path:
        entry = get_pretrained_saes_directory()[imitation.release]
        overrides = {**(entry.config_overrides or {}), **dict(imitation.overrides)}
        monkeypatch.setattr(entry, "config_overrides", overrides or None)
        return imitations.put(cache, entry.repo_id, imitation.write(entry.saes_map[imitation.sae_id]))

    return write


def peer_of(imitation: Imitation, monkeypatch):
    """SAELens' own object, by SAELens' own way; shapes, which it asks of the hub, come from the cached file."""
    from huggingface_hub import hf_hub_download
    from sae_lens import SAE as Peer
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def shapes(repo, name):
        with safe_open(hf_hub_download(repo, name), "pt") as file:
            return {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return Peer.from_pretrained(imitation.release, imitation.sae_id).requires_grad_(False)


def same(ours: SAE, peer) -> None:
    """Encode and decode as SAELens, whose decoder rows are made unit where ours are."""
    if torch.allclose(ours.W_dec.norm(dim=1), torch.ones(ours.d_sae)):
        peer.fold_W_dec_norm()
    heads = peer.hook_z_reshaping_mode
    x = X.view(len(X), 2, -1) if heads else X
    features = peer.encode(x)
    assert (features > 0).any(0).sum() > 3
    torch.testing.assert_close(ours.encode(X), features, rtol=1e-6, atol=1e-6)
    out = peer(x) if "skip" in ours.architecture else peer.decode(features)
    torch.testing.assert_close(ours.decode(features, X), out.flatten(1), rtol=1e-6, atol=1e-6)


@named
@pytest.mark.filterwarnings("ignore")
def test_every_loader(imitation, put, monkeypatch):
    put(imitation)
    ours = foreign.open_checkpoint(imitation.name)
    peer = peer_of(imitation, monkeypatch)
    assert ours.metadata["hook_name"] == peer.cfg.metadata.hook_name
    assert ours.metadata["model_name"] == peer.cfg.metadata.model_name
    same(ours, peer)
    assert foreign.find_all([imitation.name], "--checkpoint") == [imitation.name]
    assert len(foreign.checkpoint_sha256(imitation.name)) == 64


def test_imitations_are_of_every_loader():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    named = {entry.conversion_func or "sae_lens" for entry in get_pretrained_saes_directory().values()}
    assert {i.loader for i in IMITATIONS} == named
    assert len(named) == 14


@pytest.mark.parametrize("imitation", TEMPORAL, ids=lambda i: i.release)
def test_features_that_depend_on_context_are_refused(imitation, put):
    put(imitation)
    with pytest.raises(BadInput, match="temporal"):
        foreign.open_checkpoint(imitation.name)
