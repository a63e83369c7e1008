"""Checkpoints by name, read offline from imitations in a local hub cache, against SAELens' own objects."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import imitations
from conftest import ROOT
from husai.dictionaries import catalogue, checkpoints, foreign, sources
from husai.dictionaries.sae import SAE
from husai.runs.checkpoints import read_place, write_place
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
    """Encode and decode as SAELens, whose decoder rows are made unit where ours are, and as a whole those of TopK."""
    if ours.architecture == "topk":
        factor = peer.W_dec.norm(dim=1).median()
        peer.W_enc.data *= factor
        peer.b_enc.data *= factor
        peer.W_dec.data /= factor
    elif torch.allclose(ours.W_dec.norm(dim=1), torch.ones(ours.d_sae)):
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


def test_a_matching_pursuit_is_saelens_own(tmp_path):
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    peer = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=imitations.D_IN, d_sae=imitations.D_SAE, max_iterations=3))
    peer.requires_grad_(False).save_model(tmp_path)
    ours = foreign.open_checkpoint(tmp_path)
    assert ours.encode(X).count_nonzero(1).max() <= 3
    torch.testing.assert_close(ours.encode(X), peer.encode(X))
    torch.testing.assert_close(ours.decode(ours.encode(X), X), peer(X))
    assert ours.W_enc.shape == (imitations.D_IN, imitations.D_SAE)


@pytest.mark.parametrize("imitation", [i for i in READ if i.loader in ("sae_lens", "connor_rob_hook_z")])
@pytest.mark.filterwarnings("ignore")
def test_what_is_written_for_a_benchmark_computes_the_same(imitation, put, tmp_path):
    """Both libraries open it. Rows that come in another order than they were encoded in are decoded as their own."""
    from sae_lens import SAE as Peer

    put(imitation)
    ours = foreign.open_checkpoint(imitation.name)
    features = ours.encode(X)
    checkpoints.save(ours, tmp_path)
    again = foreign.open_checkpoint(tmp_path).to("cpu")
    torch.testing.assert_close(again.encode(X), features)
    torch.testing.assert_close(again.decode(features[:5], X[:5]), ours.decode(features, X)[:5])
    assert type(again) is type(ours)
    peer = Peer.load_from_disk(tmp_path)
    x = X.view(len(X), 2, -1) if peer.hook_z_reshaping_mode else X
    torch.testing.assert_close(peer.encode(x), features)


def test_a_scale_that_nothing_gives_is_refused(put, tmp_path):
    known = next(i for i in IMITATIONS if i.release == "gpt2-small-mlp-tm")
    unknown = Imitation("sae_lens", "gpt2-small-res_sce-ajt", "blocks.2.hook_resid_pre", known.write)
    put(unknown)
    with pytest.raises(BadInput, match="expected_average_only_in"):
        foreign.open_checkpoint(unknown.name)


def test_an_sae_that_the_catalogue_lacks(cache):
    for name, near in (
        ("sae-lens:gpt2-small-res-jbb/blocks.8.hook_resid_pre", "gpt2-small-res-jb"),
        ("sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pr", "blocks.8.hook_resid_pre"),
        ("sae-lens:gpt2-small-res-jb", "blocks.0.hook_resid_pre"),
    ):
        with pytest.raises(BadInput, match=f"--checkpoint: {name}: .*{near}"):
            foreign.find_all([Path(name)], "--checkpoint")


@pytest.mark.parametrize("name", ["sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre", "hf:a/b/c"])
@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_a_name_ends_in_one_line(name, offline, cache, monkeypatch):
    """Told to stay offline, or not told and without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if not offline:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=f"{name} is not in the local hub cache {cache}") as refused:
        foreign.open_checkpoint(Path(name))
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Repositories of the hub


@pytest.fixture
def repository(cache):
    """Three SAEs of a made-up repository, in a folder."""
    files = {}
    for seed in (1, 2, 3):
        files |= imitations.sae_lens(version="6.0.0", normalize_activations="none")(f"saes/seed{seed}")
    return imitations.put(cache, "some/saes", files)


def test_a_repository_of_the_hub(repository):
    names = foreign.find_all([Path("hf:some/saes/saes")], "--checkpoint")
    assert names == [Path(f"hf:some/saes@{imitations.COMMIT}/saes/seed{n}") for n in (1, 2, 3)]
    for name in (names[0], Path("hf:some/saes/saes/seed1"), Path(f"hf:some/saes@{imitations.COMMIT}/saes/seed1")):
        ours = foreign.open_checkpoint(name)
        torch.testing.assert_close(ours.encode(X), foreign.open_checkpoint(repository / "saes" / "seed1").encode(X))
        assert foreign.checkpoint_sha256(name) == foreign.checkpoint_sha256(repository / "saes" / "seed1")
        assert foreign.folder_of(name) == repository / "saes" / "seed1"
    assert len(foreign.find_all([Path("hf:some/saes")], "--checkpoint")) == 3
    file = Path("hf:some/saes/saes/seed2/sae_weights.safetensors")
    assert foreign.find_all([file], "--checkpoint") == [names[1] / file.name]
    assert foreign.open_checkpoint(file).d_sae == imitations.D_SAE


@pytest.mark.parametrize(
    "name",
    [
        "hf:some/saes/../../../outside",
        "hf:some/saes/saes/../../outside",
        "hf:../saes/saes",
        "hf:/etc/passwd",
        "hf:some",
        "hf:some/saes@/saes",
        "hf:some/saes/none",
        "hf:some/saes@other/saes",
        "hf:some/saes@../saes",
        "hf:some/saes/link",
    ],
)
def test_no_path_leaves_its_repository(name, repository, tmp_path):
    outside = tmp_path / "outside"
    foreign.open_checkpoint(Path("hf:some/saes/saes/seed1"))
    checkpoints.save(foreign.open_checkpoint(repository / "saes" / "seed1"), outside)
    (repository / "link").symlink_to(outside)
    with pytest.raises(BadInput, match="hf:"):
        foreign.find_all([Path(name)], "--checkpoint")


def test_a_path_of_the_catalogue_cannot_leave_its_repository(cache):
    _, fetched = sources.loaders_that_run_nothing()
    for filename in ("../../x/cfg.json", "/etc/passwd"):
        with pytest.raises(BadInput, match="leaves"):
            sources._fetch(fetched, "some/saes", filename)


def test_places_in_results(tmp_path):
    """A name stays a name; a path is written from the folder of the results."""
    for checkpoint in (Path("sae-lens:a/b/c"), Path("hf:a/b@c/d"), tmp_path / "saes" / "x"):
        place = write_place(checkpoint, tmp_path / "results")
        assert read_place(place, tmp_path / "results").resolve() == checkpoint.resolve() or place == str(checkpoint)
    assert place == "../saes/x"


def test_results_name_only_what_is_cached(cache, monkeypatch):
    """Whoever wrote a results file cannot make HUSAI download."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or _missing())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append(k) or _missing())
    with sources.cached_only():
        for name in ("hf:some/saes/x", "sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre"):
            with pytest.raises(BadInput):
                foreign.open_checkpoint(Path(name))
    assert asked
    assert all(how.get("local_files_only") for how in asked)


def _missing():
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("not here")


# ---------------------------------------------------------------------------------------------------------------------
# Gemma Scope's files


@pytest.mark.parametrize(
    ("place", "architecture", "hook"),
    [
        ("plain", "jumprelu", None),
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "jumprelu", "blocks.12.hook_resid_post"),
        ("gemma-scope-9b-pt-mlp/layer_3/width_16k/average_l0_82", "jumprelu", "blocks.3.hook_mlp_out"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "jumprelu", "hook_embed"),
        ("gemma-scope-2b-pt-transcoders/layer_4/width_16k/l0_6", "jumprelu_transcoder", "blocks.4.ln2.hook_normalized"),
    ],
)
def test_gemma_scope_outside_the_catalogue(place, architecture, hook, tmp_path):
    folder, w = tmp_path / place, imitations.draw(*imitations.JUMPRELU)
    folder.mkdir(parents=True)
    (folder / "params.npz").write_bytes(imitations.archived(w))
    scale = imitations.D_IN**0.5 if "embedding" in place else 1
    for path in (folder, folder / "params.npz"):
        ours = foreign.open_checkpoint(path)
        assert (ours.architecture, ours.metadata.get("hook_name")) == (architecture, hook)
        pre = X @ w["W_enc"] / scale + w["b_enc"]
        features = pre.relu() * (pre > w["threshold"])
        expected = features @ w["W_dec"] * scale + w["b_dec"]
        torch.testing.assert_close(ours.decode(ours.encode(X), X), expected, rtol=1e-5, atol=1e-5)
    assert foreign.find_all([tmp_path], "--checkpoint") == [folder]


def test_damaged_gemma_scope(tmp_path):
    path, w = tmp_path / "params.npz", imitations.draw(*imitations.JUMPRELU)
    whole = imitations.archived(w)
    for content in (
        whole[:200],
        b"",
        imitations.archived({n: t for n, t in w.items() if n != "threshold"}),
        imitations.archived(w | {"W_enc": w["W_enc"].T}),
        imitations.archived(w | {"b_enc": w["b_enc"] * float("nan")}),
    ):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=str(path)):
            foreign.open_checkpoint(path)


# ---------------------------------------------------------------------------------------------------------------------
# Trust


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def malicious(suffix: str, mark: Path) -> bytes:
    """A file of weights that also holds code."""
    file = io.BytesIO()
    if suffix == ".npz":
        np.savez(file, W_enc=np.array([Malicious(mark)], dtype=object))
    else:
        torch.save({"W_enc": torch.zeros(2), "encoder.weight": Malicious(mark)}, file)
    return file.getvalue()


PICKLES = ("connor_rob_hook_z", "dictionary_learning_1", "deepseek_r1", "qwen_scope", "goodfire")
HOLD_CODE = [i for i in IMITATIONS if i.loader in (*PICKLES, "gemma_2", "gemma_2_transcoder")]
"""Their files of weights are of formats that may hold code."""


@pytest.mark.parametrize("bare", [False, True], ids=["archive", "bare-pickle"])
@pytest.mark.parametrize("imitation", HOLD_CODE, ids=lambda i: f"{i.loader}-{i.release}-{i.sae_id[-9:]}")
def test_nothing_downloaded_runs(imitation, bare, put, tmp_path, monkeypatch):
    """Whatever the environment allows torch."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, snapshot = tmp_path / "ran", put(imitation)
    weights = [p for p in snapshot.rglob("*") if p.suffix in (".pt", ".pth", ".npz")]
    assert weights
    for path in weights:
        path.write_bytes(pickle.dumps(Malicious(mark)) if bare else malicious(path.suffix, mark))
    with pytest.raises(BadInput, match=r"code|cannot read"):
        foreign.open_checkpoint(imitation.name)
    with pytest.raises(BadInput):
        foreign.open_checkpoint(weights[0])
    assert not mark.exists()
    if weights[0].suffix != ".npz" and not bare:  # the file does what it should
        torch.load(weights[0], weights_only=False)
        assert mark.exists()


def test_no_other_loader_reads_pickles(put):
    for imitation in IMITATIONS:
        if imitation not in HOLD_CODE:
            put(imitation)
            if imitation in READ:
                foreign.open_checkpoint(imitation.name)
                assert {p.suffix for p in sources.weights_of(imitation.name)} == {".safetensors"}


def test_no_remote_code_is_trusted():
    """The setting is nowhere in the package, whatever its value."""
    for path in Path(sources.__file__).parents[1].rglob("*.py"):
        words = path.read_text()
        assert "trust_remote_code=" not in words, path
        assert "allow_pickle=True" not in words, path
        assert "weights_only=False" not in words, path


# ---------------------------------------------------------------------------------------------------------------------
# What can be judged

LISTING = "scripts/analysis/list_saes.py"


def test_the_document_is_what_the_command_prints(cache, run_script):
    code, out, _ = run_script(LISTING, "--summary")
    assert code == 0
    assert out == (ROOT / "docs" / "sources.md").read_text(), f"python {LISTING} --summary > docs/sources.md"


def test_a_listing_says_what_names_and_the_cache_say(put, run_script):
    """Of a repository that is not cached, names; of a cached one, its configuration."""

    def listed(model: str) -> dict[str, dict]:
        code, out, _ = run_script(LISTING, "--model", model)
        assert code == 0
        header, *rows = [line.split("\t") for line in out.splitlines()]
        return {row[0]: dict(zip(header, row, strict=True)) for row in rows}

    name = "sae-lens:gpt2-small-resid-post-v5-32k/blocks.3.hook_resid_post"
    before = listed("openai-community/GPT2")
    assert (before[name]["hook"], before[name]["width"]) == ("blocks.3.hook_resid_post", "-")
    put(next(i for i in IMITATIONS if str(i.name) == name))
    after = listed("gpt2-small")
    assert after.keys() == before.keys()
    assert (after[name]["width"], after[name]["architecture"]) == (str(imitations.D_SAE), "topk")
    gemma = listed("gemma-2-2b")
    assert gemma["sae-lens:gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76"]["judged"].startswith("no: ")
    assert gemma["sae-lens:gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104"]["hook"] == "blocks.0.attn.hook_z"
    assert {row["status"] for row in gemma.values()} == {"tested"}


def test_a_model_without_saes(cache, refused):
    refused(["--model", "gpt3", "gpt2-small"], LISTING, "--model", "gpt3")


def test_what_was_opened_is_recorded(put, cache, run_script, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "OPENED", tmp_path / "opened.json")
    put(IMITATIONS[0])
    name = str(IMITATIONS[0].name)
    for _ in range(2):
        assert run_script(LISTING, "--open", name)[0] == 0
    (entry,) = catalogue.read_opened()
    assert (entry["name"], entry["d_sae"]) == (name, imitations.D_SAE)
    assert entry["sha256"] == foreign.checkpoint_sha256(IMITATIONS[0].name)
    assert [sae.name for sae in catalogue.listed("gpt2") if sae.status == "opened"] == [name]
    refused(["--open", "sae-lens:"], LISTING, "--open", tmp_path)
    refused([str(IMITATIONS[1].name), str(cache)], LISTING, "--open", IMITATIONS[1].name)


def test_every_imitated_loader_has_an_imitation():
    assert set(catalogue.IMITATED) == {i.loader for i in IMITATIONS}


def test_a_repository_of_which_a_part_is_cached(repository, cache):
    """The hub's client remembers which files a repository has: those that are not asked for may be missing."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    folder = repository.parents[1]
    paths = [str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()]
    entry = TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(folder), imitations.COMMIT, dict.fromkeys([*paths, "other/sae_weights.safetensors"], entry))
    (repository / "saes" / "seed3" / "sae_weights.safetensors").unlink()
    assert foreign.open_checkpoint(Path("hf:some/saes/saes/seed1")).d_sae == imitations.D_SAE
    for lacking in ("hf:some/saes/saes/seed3", "hf:some/saes/other", "hf:some/saes/saes"):
        with pytest.raises(BadInput, match=f"{lacking} is not in the local hub cache"):
            foreign.find_all([Path(lacking)], "--checkpoint")
