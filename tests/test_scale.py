"""Encoder × s with decoder ÷ s is one SAE: no figure depends on s."""

import json
from itertools import combinations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.functional import normalize

from husai.dictionaries import checkpoints, foreign
from husai.dictionaries.sae import ARCHITECTURES, ENCODER, SAE
from husai.stability import recurrence
from husai.stability.scores import SCORES, score
from husai.subjects import pretrained
from husai.training.recovered import cross_entropies
from husai.training.trainer import evaluate
from miniature import few_texts, save_miniature

D_IN, D_SAE, K = 16, 24, 4
SCALED = ("W_enc", "b_enc", "b_gate", "b_mag", "threshold")
"""What has the unit of a feature."""
KINDS = {
    "standard": "free",
    "gated": "free",
    "jumprelu": "free",
    "topk": "one",
    "layer_norm": "free",
    "batchtopk": "one",
}
"""SAE -> whether each feature has a scale of its own, or all have one: what is kept of TopK SAEs rests on the scale."""


def weights(kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    architecture = ARCHITECTURES.get(kind, "jumprelu" if kind == "batchtopk" else "standard")
    w = {name: 0.1 * torch.randn(D_SAE, generator=g) for name in ENCODER[architecture] if name != "W_enc"}
    w |= {"threshold": w["threshold"].abs()} if "threshold" in w else {}
    w["W_dec"] = normalize(torch.randn(D_SAE, D_IN, generator=g)) * (0.5 + torch.rand(D_SAE, 1, generator=g))
    return w | {"W_enc": torch.randn(D_IN, D_SAE, generator=g), "b_dec": 0.1 * torch.randn(D_IN, generator=g)}


def scaled(w, factor):
    """Encoder × factor `[d_sae]`, decoder ÷ factor."""
    return w | {n: w[n] * factor for n in SCALED if n in w} | {"W_dec": w["W_dec"] / factor[:, None]}


def write(folder, kind, w):
    """In SAELens' layout."""
    named = {"topk": {"k": K}, "batchtopk": {"k": K}, "layer_norm": {"normalize_activations": "layer_norm"}}.get(
        kind, {}
    )
    if kind == "batchtopk":
        w = w | {"topk_threshold": w["threshold"].mean()}
        w.pop("threshold")
    config = {"architecture": "standard" if kind == "layer_norm" else kind, "d_in": D_IN, "d_sae": D_SAE}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    config |= {"dtype": "float32", "device": "cpu", "metadata": {"sae_lens_version": "6.54.12"}}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "cfg.json").write_text(json.dumps(config | named))
    save_file({name: t.contiguous() for name, t in w.items()}, folder / "sae_weights.safetensors")
    return foreign.open_checkpoint(folder)


def factors(kind, exponents):
    """`[d_sae]`; one for all where TopK chooses."""
    of = 10 ** torch.tensor(exponents)
    return of if KINDS[kind] == "free" else of[:1].expand(D_SAE)


@pytest.fixture
def store(make_store):
    return make_store(3 * torch.randn(500, D_IN, generator=torch.Generator().manual_seed(9)))


def figures(saes, store):
    """Every figure that phases report of SAEs and pairs."""
    found = {}
    for i, sae in enumerate(saes):
        of_one, rate = evaluate(sae, store, range(store.rows))
        found |= {f"{name} {i}": value for name, value in of_one.to_json().items() if name != "outliers"} | {
            f"rate {i}": rate
        }
    alive = torch.ones(D_SAE, dtype=torch.bool)
    for i, j in combinations(range(len(saes)), 2):
        found |= {f"{name} {i}{j}": v for name, v in score(saes[i].W_dec, saes[j].W_dec, alive, alive, SCORES).items()}
    compared = recurrence.compare([sae.W_dec for sae in saes], draws=1)
    found |= {name: value.estimate for name, value in compared.scores.items()}
    return found | {"recurrence": torch.tensor([k.tolist() for k in compared.recurrence])}


def kind_and_scales():
    return st.lists(st.floats(-4, 4), min_size=D_SAE, max_size=D_SAE)


@pytest.mark.parametrize("kind", KINDS)
@given(exponents=kind_and_scales())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_figure_depends_on_the_scale_of_features(kind, exponents, store, tmp_path):
    """Each of three SAEs has scales of its own: those of seeds are never alike."""
    plain, other = [], []
    for seed in range(3):
        w = weights(kind, seed)
        w["W_dec"][:8] = weights(kind)["W_dec"][:8]  # that recur
        plain.append(write(tmp_path / f"plain{seed}", kind, w))
        other.append(
            write(tmp_path / f"scaled{seed}", kind, scaled(w, factors(kind, exponents[seed:] + exponents[:seed])))
        )
    x = store.read(0, 100)
    for one, two in zip(plain, other, strict=True):
        features = one.encode(x)
        assert (features > 0).any()
        torch.testing.assert_close(two.encode(x), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(two.decode(features, x), one.decode(features, x), rtol=1e-4, atol=1e-4)
    expected, found = figures(plain, store), figures(other, store)
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(value), rtol=1e-4, atol=1e-5, msg=name)


def test_nor_does_the_cross_entropy(tmp_path):
    texts = few_texts()
    subject = pretrained.load(str(save_miniature(tmp_path / "miniature", texts.train)))
    saes = []
    for kind in KINDS:
        w = weights(kind)
        factor = factors(kind, torch.linspace(-3, 3, D_SAE).tolist())
        saes += [write(tmp_path / kind, kind, w), write(tmp_path / f"{kind}-scaled", kind, scaled(w, factor))]
    losses = cross_entropies(subject, "blocks.1.hook_resid_pre", saes, texts.heldout[:20])["spliced"]
    assert losses[::2] == pytest.approx(losses[1::2], abs=1e-5)
    assert len({round(loss, 6) for loss in losses[::2]}) > 1


@pytest.mark.parametrize("exponent", [-25, 25])
def test_scales_whose_squares_are_no_float32_are_scales(exponent, tmp_path):
    w = weights("standard")
    factor = torch.full((D_SAE,), 10.0**exponent)
    one, two = write(tmp_path / "a", "standard", w), write(tmp_path / "b", "standard", scaled(w, factor))
    torch.testing.assert_close(two.W_dec, one.W_dec, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two.W_enc, one.W_enc, rtol=1e-4, atol=1e-4)


def test_what_is_of_unit_scale_keeps_its_bits(tmp_path):
    """Of HUSAI's own checkpoints, whose rows are unit, evidence rests on the very bits."""
    w = weights("topk")
    sae = SAE(w | {"W_dec": normalize(w["W_dec"])}, "topk", K)
    checkpoints.save(sae, tmp_path)
    assert all(torch.equal(t, sae.weights[name]) for name, t in checkpoints.load(tmp_path).weights.items())
