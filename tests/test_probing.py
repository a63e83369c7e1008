"""Exact probes: the optimum of sae-probes' objective, its splits and features, under a name of their own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from husai.dictionaries.checkpoints import checkpoint_digest
from husai.dictionaries.sae import SAE
from husai.evals import loaded, sae_probes, sae_probes_exact
from husai.subjects import pretrained, text
from miniature import few_texts, save_miniature

HOOK = "blocks.1.hook_resid_pre"
SETS = ("96_spam_is",)


def sparse_rows(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that are mostly 0, of very different sizes, and classes that depend on them."""
    rng = np.random.default_rng(seed)
    x = np.maximum(0, rng.normal(size=(n, k)) - 0.5) * rng.uniform(0.1, 10, k)
    odds = x @ rng.normal(size=k) * rng.choice([0.1, 1, 10])
    y = (rng.random(n) < 1 / (1 + np.exp(-(odds - np.median(odds))))).astype(int)
    y[:2] = 0, 1
    return x, y


def objective(x, y, w, b, C) -> float:
    return C * np.logaddexp(0, -(2 * y - 1) * (x @ w + b)).sum() + np.abs(w).sum()


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")  # ours is at least as good, converged or not
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 3, 8]))
def test_every_fit_of_the_path_is_the_optimum(seed, k):
    x, y = sparse_rows(seed, 150, k)
    coefficients, intercepts = sae_probes_exact.path(x, y, sae_probes_exact.GRID)
    for w, b, C in zip(coefficients, intercepts, sae_probes_exact.GRID, strict=True):
        ours = objective(x, y, w, b, C)
        other = LogisticRegression(C=C, l1_ratio=1, solver="liblinear", intercept_scaling=1e3, tol=1e-8, max_iter=2000)
        other.fit(x - x.mean(0), y)  # centred, because liblinear penalises the intercept a little
        (theirs,) = other.coef_
        assert ours <= objective(x, y, theirs, other.intercept_[0] - theirs @ x.mean(0), C) * (1 + 1e-7)
        # Duality: with u the share of each class that the probe gets wrong, scaled until both sums are equal and
        # |X'u| <= 1/C, the least objective is at least the entropy of u. Close to it where the penalty is not tiny.
        wrong = expit((1 - 2 * y) * (x @ w + b))
        positive, negative = wrong[y == 1].sum(), wrong[y == 0].sum()
        dual = wrong * np.where(y == 1, min(1, negative / positive), min(1, positive / negative))
        dual *= min(1, 1 / (C * np.abs(x.T @ (dual * (2 * y - 1))).max()))
        bound = C * (entr(dual) + entr(1 - dual)).sum()
        assert bound <= ours * (1 + 1e-9)
        if C <= 1:
            assert ours <= bound * (1 + 1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=4, max_size=30))
def test_auc_counts_ties_half(scores):
    y = np.arange(len(scores)) % 2
    assert sae_probes_exact.auc(np.array(scores, float), y) == pytest.approx(roc_auc_score(y, scores))


def test_ties_of_the_validation_go_to_the_largest_C():
    """One feature gives one order of the rows, whatever C, as long as it is used at all."""
    x, y = sparse_rows(3, 400, 1)
    probe = sae_probes_exact.fit(x, y)
    (w,), _ = sae_probes_exact.path(x, y, sae_probes_exact.GRID[-1:])
    assert probe.coefficients == pytest.approx(w, rel=1e-5)
    with pytest.raises(ValueError, match="128"):
        sae_probes_exact.fit(x[:100], y[:100])


# ---------------------------------------------------------------------------------------------------------------------
# Beside the official code


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """(official, exact): the same SAE of the miniature on the same data sets."""
    root = tmp_path_factory.mktemp("probing")
    patch = pytest.MonkeyPatch()
    patch.setattr(text, "corpus", few_texts)
    subject = pretrained.load(str(save_miniature(root / "miniature", few_texts().train)))
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=1)
    sae = SAE({"W_enc": W.T.contiguous(), "b_enc": torch.zeros(24), "W_dec": W, "b_dec": torch.zeros(16)}, "topk", 4)
    path = loaded.to_saelens(sae, subject, HOOK, root / "sae")
    from husai.activations.language_model import harvest_prompts

    harvest_prompts(subject, [HOOK], list(SETS), root / "cache")
    patch.undo()
    official = sae_probes.Settings(subject.digest, subject.name, HOOK, SETS, (1, 5))
    places = {"cache": str(root / "cache"), "root": str(root / "results"), "device": "cpu"}
    task = sae_probes.ProbeTask("sae", "sae", str(path), checkpoint_digest(path), 42, official, **places)
    return task, replace(task, settings=replace(official, probing="sae_probes_exact"))


@pytest.mark.slow
def test_exact_probes_keep_splits_and_features(tasks, tmp_path):
    """At k = 1 every fit orders the rows alike, therefore the official code agrees; at k = 5 another solver does."""
    from sae_probes.generate_sae_activations import generate_sae_activations
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
    from sae_probes.utils_training import find_best_reg

    from husai.dictionaries import checkpoints

    _, exact = tasks
    (ours,) = sae_probes.run([exact], 1, tmp_path)
    sae, s = checkpoints.load(Path(exact.path)), exact.settings
    x = generate_sae_activations(sae, "normal", SETS[0], HOOK, s.model_name, "cpu", None, None, exact.cache, seed=42)
    order = get_sorted_indices(x.X_train, x.y_train, mean_act_normalization)
    split = x.X_train[:, order[:1]], x.y_train, x.X_test[:, order[:1]], x.y_test
    theirs = find_best_reg(*split, penalty="l1", seed=42).metrics
    for metric in ("test_auc", "val_auc"):
        assert ours["1"][metric][0] == pytest.approx(getattr(theirs, metric), abs=1e-9)

    chosen = x.X_train[:, order[:5]].double().numpy()
    n = len(chosen) - 100
    best = 0.0
    for C in np.logspace(5, -5, 10):  # liblinear, whose penalty on the intercept a large scaling makes negligible
        model = LogisticRegression(C=C, l1_ratio=1, solver="liblinear", intercept_scaling=1e3, tol=1e-8, max_iter=5000)
        model.fit(chosen[:n], x.y_train[:n])
        best = max(best, roc_auc_score(x.y_train[n:], model.decision_function(chosen[n:])))
    assert ours["5"]["val_auc"][0] == pytest.approx(best, abs=2e-3)


def test_figures_of_two_names_lie_apart_and_are_kept(tasks, tmp_path):
    official, exact = tasks
    assert official.folder != exact.folder
    assert "scipy" in exact.key["versions"]
    assert "scipy" not in official.key["versions"]
    (before,) = sae_probes.run([exact], 1, tmp_path)
    noted = exact.file(SETS[0]).stat().st_mtime_ns
    assert sae_probes.run([exact], 1, tmp_path) == [before]
    assert exact.file(SETS[0]).stat().st_mtime_ns == noted
    exact.file(SETS[0]).write_text("[")
    assert sae_probes.run([exact], 1, tmp_path) == [before], "a damaged file is made again"


def test_the_models_own_probe_is_sae_probes(tasks, tmp_path):
    _, exact = tasks
    llm = replace(exact, label="llm", kind="llm", path=None, identity=exact.settings.subject_digest)
    (figures,) = sae_probes.run([llm], 1, tmp_path)
    assert list(figures) == ["llm"]
    assert 0 < figures["llm"]["test_auc"][0] < 1
