"""Checkpoints of other libraries, written by those libraries, against their own encode and decode."""

import json
import os
import pickle
import shutil
from functools import partial

import pytest
import torch

from husai.dictionaries import foreign
from husai.dictionaries.foreign import open_checkpoint, weights_file
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY
from peers import in_unit_scale

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
INSTALL = "pip install --no-deps -r requirements-bench.txt"
X = torch.randn(60, 12, generator=torch.Generator().manual_seed(1)) * 2


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter moved, so that no bias is zero and no side the transpose of the other."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def learning(cls: str, d_sae: int) -> torch.nn.Module:
    pytest.importorskip("dictionary_learning", reason=INSTALL)
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    places = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
    make = next(getattr(place, cls) for place in places if hasattr(place, cls))
    extra = {"k": 3} if "TopK" in cls else {}
    extra |= {"group_sizes": [d_sae - 2, 2]} if "Matryoshka" in cls else {}
    module = shaken(make(12, d_sae, **extra))
    with torch.no_grad():
        if "BatchTopK" in cls:
            module.threshold.fill_(0.4)
        if cls == "JumpReluAutoEncoder":
            module.threshold.abs_()
    return module


CLASSES = [
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
]


def save_learning(module, cls, folder):
    torch.save(module.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": cls, "lm_name": "pythia", "submodule_name": "resid_post_layer_3"}
    trainer |= {"k": 3} if "TopK" in cls else {}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))


@pytest.mark.parametrize("d_sae", [12, 30])  # 12: as wide as the input, where shapes say nothing
@pytest.mark.parametrize("cls", CLASSES)
def test_dictionary_learning(cls, d_sae, tmp_path):
    theirs = learning(cls, d_sae)
    save_learning(theirs, cls, tmp_path)
    ours = open_checkpoint(tmp_path)
    features = theirs.encode(X).detach()
    assert (features > 0).any()
    W_dec = theirs.W_dec if hasattr(theirs, "W_dec") else theirs.decoder.weight.T
    scaled = in_unit_scale(features, W_dec, topk=cls == "AutoEncoderTopK")
    torch.testing.assert_close(ours.encode(X), scaled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(scaled), theirs.decode(features).detach(), rtol=1e-5, atol=1e-5)
    assert ours.metadata["model_name"] == "pythia"
    assert weights_file(tmp_path) == tmp_path / "ae.pt"


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("d_sae", [12, 30])
def test_sparsify(transcode, skip, d_sae, tmp_path):
    pytest.importorskip("sparsify", reason=INSTALL)
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=d_sae, k=4, transcode=transcode, skip_connection=skip)
    theirs = shaken(SparseCoder(12, config))
    theirs.save_to_disk(tmp_path)
    ours = open_checkpoint(tmp_path)
    top = theirs.encode(X)
    features = torch.zeros(len(X), d_sae).scatter(1, top.top_indices, top.top_acts).detach()
    features = in_unit_scale(features, theirs.W_dec, topk=True)
    torch.testing.assert_close(ours.encode(X), features, rtol=1e-5, atol=1e-5)
    out = theirs(X).sae_out.detach()
    torch.testing.assert_close(ours.decode(ours.encode(X), X), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "relu", "batchtopk", "jumprelu"])
def test_the_earlier_study(architecture, linear, tmp_path):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    W_enc, W_dec, b_enc, b_dec = draw(12, 12), draw(12, 12), draw(12), draw(12)
    W_dec = torch.nn.functional.normalize(W_dec)
    if linear:
        state = {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "decoder.weight": W_dec.T}
        state |= {"feature_counts": torch.ones(12)}
        b_dec = torch.zeros(12)
    else:
        state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    threshold = {"batchtopk": torch.tensor(0.7), "jumprelu": draw(12).abs()}.get(architecture)
    if threshold is not None:
        state["threshold"] = threshold
    about = {"architecture": architecture, "d_model": 12, "d_sae": 12, "k": 3}
    torch.save({"model_state_dict": state, **about}, tmp_path / "sae_final.pt")
    pre = (X if linear else X - b_dec) @ W_enc + b_enc
    features = pre.relu()
    if architecture == "topk":
        kth = pre.topk(3, dim=1).values[:, -1:]
        features = features * (pre >= kth)
    elif threshold is not None:
        features = features * (pre > threshold)
    torch.save(state | about, tmp_path / "bare.pt")
    for path in (tmp_path, tmp_path / "sae_final.pt", tmp_path / "bare.pt"):
        ours = open_checkpoint(path)
        torch.testing.assert_close(ours.encode(X), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(features), features @ W_dec + b_dec, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["ae.pt", "sae_final.pt"])
@pytest.mark.parametrize("write", [partial(torch.save), lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_malicious_pickle_runs_nothing(name, write, tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    write({"encoder.weight": Malicious(trap)}, tmp_path / name)
    with pytest.raises(BadInput, match=f"{tmp_path / name} "):
        open_checkpoint(tmp_path)
    assert not trap.exists()
    torch.load(tmp_path / name, weights_only=False) if write.__class__ is partial else pickle.loads(
        (tmp_path / name).read_bytes()
    )
    assert trap.exists(), "the trap is real: another way of reading it would have run it"


def learned(tmp_path, change=lambda state, trainer: None, cls="AutoEncoderTopK"):
    module = learning(cls, 30)
    save_learning(module, cls, tmp_path)
    state, config = module.state_dict(), json.loads((tmp_path / "config.json").read_text())
    change(state, config["trainer"])
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (
            partial(learned, change=lambda s, t: t.update(dict_class="IdentityDict")),
            "'IdentityDict'.*AutoEncoder",
        ),
        (partial(learned, change=lambda s, t: s.pop("b_dec")), r"ae\.pt: b_dec "),
        (partial(learned, change=lambda s, t: s.update(scale=torch.ones(1))), r"ae\.pt: scale "),
        (partial(learned, change=lambda s, t: (t.update(k=31), s.pop("k"))), r"\bk 31 .*\b30\b"),
        (partial(learned, change=lambda s, t: t.update(k=4)), r"\bk .*\b4\b.*\b3\b"),
        (partial(learned, change=lambda s, t: t.update(dict_size=31)), r"dict_size .*\b31\b.*\b30\b"),
        (partial(learned, change=lambda s, t: t.update(dict_class=["x"])), "dict_class .'x'."),
        (partial(learned, change=lambda s, t: s.update(b_dec=s["b_dec"].int())), r"ae\.pt: .*floats"),
        (
            lambda f: torch.save({"k": 3, "W_enc": X, "threshold": X[0]}, f / "sae_final.pt"),
            r"\bk\b.*\bthreshold\b.*\barchitecture\b",
        ),
        (partial(learned, change=lambda s, t: t.update(k="many")), "k .*'many'"),
        (partial(learned, change=lambda s, t: (t.pop("k"), s.update(k=torch.tensor(2.5)))), r"k .*\b2\.5\b"),
        (partial(learned, change=lambda s, t: (t.pop("k"), s.update(k=torch.tensor(torch.nan)))), r"k .*\bnan\b"),
        (
            lambda f: torch.save(
                {n: torch.ones(()) for n in ("encoder.weight", "encoder.bias", "decoder.weight")}, f / "sae_final.pt"
            ),
            r"sae_final\.pt: .*matrices",
        ),
        (partial(learned, change=lambda s, t: s["b_dec"].fill_(torch.nan)), "NaN"),
        (partial(learned, change=lambda s, t: s.update(b_dec=torch.ones(11))), r"'b_dec': \(11,"),
        (partial(learned, change=lambda s, t: s.update(note="hello")), r"ae\.pt: .*\btensors\b"),
        (
            partial(learned, change=lambda s, t: s["threshold"].fill_(-1), cls="BatchTopKSAE"),
            "threshold",
        ),
        (lambda f: (f / "sae_final.pt").write_bytes(b"PK\x03\x04 cut off"), r"sae_final\.pt "),
        (lambda f: (f / "sae_final.pt").write_bytes(b""), r"sae_final\.pt "),
        (lambda f: (f / "sae_final.pt").write_text("<html>not found</html>"), r"sae_final\.pt "),
        (lambda f: (f / "sae_final.pt").write_text("e\n"), r"sae_final\.pt (.*torch\.save|holds more)"),
        (lambda f: torch.save([1, 2], f / "sae_final.pt"), r"sae_final\.pt: .*\btensors\b"),
        (lambda f: torch.save({"architecture": "vq", "model_state_dict": {}}, f / "sae_final.pt"), "'vq'.*topk"),
        (lambda f: torch.save({"W_enc": X}, f / "sae_final.pt"), r"sae_final\.pt: (W_dec|b_dec) "),
        (lambda f: None, "cfg.json"),
    ],
)
def test_what_is_damaged_or_unknown_is_refused_in_one_line(make, named, tmp_path):
    make(tmp_path)
    with pytest.raises(BadInput, match=named) as refused:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"activation": "groupmax"}, "activation 'groupmax'"), ({"whitening": True}, "whitening")],
)
def test_unknown_settings_of_sparsify_are_refused(change, named, tmp_path):
    pytest.importorskip("sparsify", reason=INSTALL)
    from sparsify import SparseCoder, SparseCoderConfig

    SparseCoder(12, SparseCoderConfig(num_latents=30, k=4)).save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=rf"cfg\.json: {named}\W"):
        open_checkpoint(tmp_path)


def test_the_final_checkpoint_of_each_training_is_taken(tmp_path, caplog):
    shipped = REPOSITORY / "assets" / "husai-tiny-saes"
    for seed in ("seed42", "seed123"):
        for place in (tmp_path / seed, tmp_path / seed / "checkpoints" / "500"):
            shutil.copytree(shipped / seed, place, dirs_exist_ok=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one").symlink_to(shipped / "seed456")
    with caplog.at_level("INFO", logger="husai"):
        found = foreign.find_all([tmp_path], "--checkpoint")
    assert found == [tmp_path / "links" / "one", tmp_path / "seed123", tmp_path / "seed42"]
    assert sum("2 checkpoints" in record.message for record in caplog.records) == 2
