"""The TopK family and the stacked trainer, against plain references."""

import math

import numpy as np
import pytest
import torch

import husai.training.trainer as trainer
from husai.activations.order import BatchReader
from husai.dictionaries import topk
from husai.runs.errors import BadInput
from husai.stability.scores import max_cosines
from husai.training.trainer import Member, TrainingConfig, evaluate, geometric_median, train

CPU = torch.device("cpu")
D_IN, D_SAE = 6, 10


def parameters(seed=0, n=2):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "W_enc": draw(n, D_IN, D_SAE),
        "b_enc": draw(n, D_SAE),
        "W_dec": draw(n, D_SAE, D_IN),
        "b_dec": draw(n, D_IN),
    }


def reference_loss(p, x, k, dead, variance, k_aux, coefficient):
    """One member, row by row, feature by feature, as the paper writes it."""
    main, chosen_dead, errors = 0.0, [], []
    for row in x:
        pre = p["W_enc"].T @ (row - p["b_dec"]) + p["b_enc"]
        kept = sorted(range(len(pre)), key=lambda j: -pre[j].item())[:k]
        reconstruction = p["b_dec"] + sum(torch.relu(pre[j]) * p["W_dec"][j] for j in kept)
        main = main + (row - reconstruction).square().sum() / len(x) / variance
        errors.append((row - reconstruction).detach())
        order = sorted((j for j in range(len(pre)) if dead[j]), key=lambda j: -pre[j].item())[:k_aux]
        chosen_dead.append(sum((torch.relu(pre[j]) * p["W_dec"][j] for j in order), torch.zeros(x.shape[1])))
    if not dead.any():
        return main
    error, model = torch.stack(errors), torch.stack(chosen_dead)
    return main + coefficient * (error - model).square().sum() / error.square().sum()


@pytest.mark.parametrize("dead_counts", [(0, 0), (4, 4), (1, 7), (0, 3), (10, 2)])
def test_loss_and_every_gradient_equal_the_plain_reference(dead_counts):
    params = {name: t.requires_grad_() for name, t in parameters().items()}
    x = torch.randn(2, 7, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k = torch.tensor([3, 2])
    dead = torch.zeros(2, D_SAE, dtype=torch.bool)
    for i, count in enumerate(dead_counts):
        dead[i, :count] = True
    loss, main, fired = topk.loss(params, x, k, dead, 5.0, k_aux=3, aux_coefficient=1 / 32)
    assert (main <= loss).all()
    loss.sum().backward()
    for i in range(2):
        single = {name: t[i].detach().clone().requires_grad_() for name, t in params.items()}
        expected = reference_loss(single, x[i], int(k[i]), dead[i], 5.0, 3, 1 / 32)
        expected.backward()
        torch.testing.assert_close(loss[i], expected, rtol=1e-12, atol=0)
        for name, t in params.items():
            torch.testing.assert_close(t.grad[i], single[name].grad, rtol=1e-9, atol=1e-12, msg=name)
        pre = topk.pre_activations({n: t[i : i + 1].detach() for n, t in params.items()}, x[i : i + 1])
        assert torch.equal(fired[i], (topk.keep_top(pre, k[i : i + 1]) > 0).any(1)[0])


def test_aux_gradient_reaches_the_encoder_of_dead_features():
    params = {name: t.requires_grad_() for name, t in parameters(n=1).items()}
    with torch.no_grad():
        params["b_enc"][0, 0] = -1e-3  # feature 0 is never among the top k …
        params["W_enc"][0, :, 0] *= 1e-3
    x = torch.randn(1, 50, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for dead in (False, True):
        mask = torch.zeros(1, D_SAE, dtype=torch.bool)
        mask[0, 0] = dead
        topk.loss(params, x, torch.tensor([2]), mask, 1.0, 3, 1 / 32)[0].sum().backward()
        gradients.append([params[n].grad[0, ..., 0].abs().sum().item() for n in ("W_enc", "b_enc")])
        for p in params.values():
            p.grad = None
    assert gradients[0] == [0.0, 0.0]
    assert min(gradients[1]) > 0, "… and AuxK alone moves it"


def test_keep_top_against_numpy():
    pre = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0))
    kept = topk.keep_top(pre, torch.tensor([1, 12])).numpy()
    for i, k in enumerate((1, 12)):
        for row, found in zip(pre[i].numpy(), kept[i], strict=True):
            expected = np.zeros(30, np.float32)
            top = np.argsort(-row)[:k]
            expected[top] = np.maximum(row[top], 0)
            np.testing.assert_array_equal(found, expected)


def test_geometric_median_minimises_the_sum_of_distances():
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    x[:40] += 100
    median = geometric_median(x)
    assert median.norm() < 1 < x.mean(0).norm(), "outliers hardly move it"
    total = lambda m: (x - m).norm(dim=1).sum()  # noqa: E731
    for step in torch.eye(3) * 0.05:
        assert total(median) < min(total(median + step), total(median - step))


# ---------------------------------------------------------------------------------------------------------------------
# The loop

CONFIG = TrainingConfig(tokens=50 * 128 - 40, batch_size=128, dead_after_tokens=256, snapshots=4, curve_points=10)


def member(seed, d_sae=24, k=3, rate=3e-3, order=None):
    return Member(seed, d_sae, k, rate, seed if order is None else order)


def state(trained):
    return torch.cat([p.flatten() for t in trained for p in (t.sae.W_enc, t.sae.b_enc, t.sae.W_dec, t.sae.b_dec)])


def test_stacked_run_equals_separate_runs(make_store, planted, tmp_path):
    """float64, 50 steps: members that differ in seed, k, rate, width and order, with AuxK at work."""
    store = make_store(planted[0])
    members = [
        member(1),
        member(2, k=5),
        member(3, rate=1e-3),
        member(4, d_sae=40),
        member(5, order=1),
        member(6, 40, 1),
    ]
    stacked, steps = train(store, members, CONFIG, CPU, tmp_path / "s", dtype=torch.float64)
    assert any(t.aux_steps for t in stacked)
    for m, together in zip(members, stacked, strict=True):
        (alone,), alone_steps = train(store, [m], CONFIG, CPU, tmp_path / "s", dtype=torch.float64)
        assert alone_steps == steps
        assert alone.aux_steps == together.aux_steps
        torch.testing.assert_close(state([together]), state([alone]), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(together.decoders, alone.decoders, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(together.curve, alone.curve, rtol=1e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 17, 49])
def test_interrupted_training_resumes_bit_identically(make_store, planted, tmp_path, monkeypatch, killed_at):
    store = make_store(planted[0])
    members = [member(1), member(2, d_sae=40)]
    whole, _ = train(store, members, CONFIG, CPU, tmp_path / "whole")

    take, calls = BatchReader.take, []

    def dies(self, n):
        calls.append(n)
        if len(calls) > 2 * killed_at:
            raise Killed
        return take(self, n)

    monkeypatch.setattr(BatchReader, "take", dies)
    with pytest.raises(Killed):
        train(store, members, CONFIG, CPU, tmp_path / "killed", seconds_between_saves=-1)
    monkeypatch.setattr(BatchReader, "take", take)
    saved = (tmp_path / "killed").read_bytes()
    resumed, _ = train(store, members, CONFIG, CPU, tmp_path / "killed")
    assert torch.equal(state(whole), state(resumed))
    assert [t.curve for t in whole] == [t.curve for t in resumed]
    assert all(torch.equal(a.decoders, b.decoders) for a, b in zip(whole, resumed, strict=True))
    assert not (tmp_path / "killed").exists(), "a finished run leaves no state behind"

    for damaged in (saved[:-9], saved[:-9] + b"\1" + saved[-8:], b"", b"not safetensors"):
        (tmp_path / "killed").write_bytes(damaged)
        again, _ = train(store, members, CONFIG, CPU, tmp_path / "killed")
        assert torch.equal(state(whole), state(again)), "a damaged state is not used"


def test_state_of_another_run_is_not_used(make_store, planted, tmp_path, caplog):
    store = make_store(planted[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Path, "unlink", lambda *a, **k: None)
        train(store, [member(1)], CONFIG, CPU, tmp_path / "state", seconds_between_saves=-1)
    assert (tmp_path / "state").exists()
    other, _ = train(store, [member(2)], CONFIG, CPU, tmp_path / "state")
    assert "belongs to another run" in caplog.text
    fresh, _ = train(store, [member(2)], CONFIG, CPU, tmp_path / "fresh")
    assert torch.equal(state(other), state(fresh))


def test_token_budget_is_met_exactly_and_orders_are_shared(make_store, planted, tmp_path, monkeypatch):
    taken = {}
    take = BatchReader.take
    monkeypatch.setattr(BatchReader, "take", lambda self, n: taken.setdefault(self.seed, []).append(n) or take(self, n))
    train(make_store(planted[0]), [member(1), member(2, order=1), member(3)], CONFIG, CPU, tmp_path / "s")
    assert {seed: sum(counts) for seed, counts in taken.items()} == {1: CONFIG.tokens, 3: CONFIG.tokens}


def test_seeds_give_different_saes_and_separate_streams(make_store, planted, tmp_path):
    store = make_store(planted[0])
    trained, _ = train(store, [member(1), member(2), member(1, order=2)], CONFIG, CPU, tmp_path / "s")
    first, second, reordered = (t.decoders for t in trained)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], reordered[0]), "the order seed does not touch the initialisation"
    assert not torch.equal(first[-1], reordered[-1])
    for t in trained:
        torch.testing.assert_close(t.sae.W_dec.norm(dim=1), torch.ones(24))


def test_trained_sae_recovers_the_planted_features(make_store, planted, tmp_path):
    """The positive control: known features, a model that can express them."""
    x, features = planted
    store = make_store(x)
    config = TrainingConfig(tokens=400_000, batch_size=256)
    (t,), _ = train(store, [member(1, d_sae=40, rate=5e-3)], config, CPU, tmp_path / "s")
    found, _ = max_cosines(features, t.sae.W_dec)
    untrained, _ = max_cosines(features, t.decoders[0])
    assert (found > 0.9).float().mean() > 0.9
    assert (untrained > 0.9).float().mean() < 0.1
    figures, _ = evaluate(t.sae, store, store.split(0.2)[1])
    assert figures["explained_variance"] > 0.9
    assert t.curve[-1] < 0.2 * t.curve[0]


def test_evaluate_against_numpy(make_store, planted, tmp_path):
    x = planted[0] * 3 + 5
    store = make_store(x)
    (t,), _ = train(store, [member(1)], CONFIG, CPU, tmp_path / "s")
    held = x[4800:].double().numpy()
    features = t.sae.encode(x[4800:])
    error = held - t.sae.decode(features).double().numpy()
    figures, rate = evaluate(t.sae, store, range(4800, 6000), batch=500)
    assert figures["explained_variance"] == pytest.approx(
        1 - (error**2).sum() / ((held - held.mean(0)) ** 2).sum(), abs=1e-5
    )
    assert figures["mse"] == pytest.approx((error**2).mean(), rel=1e-5)
    active = features.numpy() > 0
    assert figures["l0"] == pytest.approx(active.sum(1).mean())
    assert figures["dead_share"] == pytest.approx((~active.any(0)).mean())
    np.testing.assert_allclose(rate, active.mean(0))
    assert figures["l0"] <= 3


def test_scaling_is_folded_exactly():
    """f(s·x) of the trained SAE and what `unscaled` returns are the same map, up to the factor s."""
    params = {name: t[0].float() for name, t in parameters(n=1).items()}
    x = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(2))
    sae = trainer.unscaled(params, k=3, scale=4.0)
    stack = {name: t.unsqueeze(0) for name, t in params.items()}
    features = topk.keep_top(topk.pre_activations(stack, 4.0 * x.unsqueeze(0)), torch.tensor([3]))
    torch.testing.assert_close(sae.encode(x) * 4.0, features[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)) * 4.0, topk.decode(stack, features)[0], rtol=1e-5, atol=1e-5)


def test_schedules():
    config = TrainingConfig(tokens=1000 * 10, batch_size=10, warmup_fraction=0.1, decay_fraction=0.2, snapshots=4)
    factors = [config.learning_rate_factor(s) for s in range(1000)]
    assert factors[0] == 0.01
    assert factors[99] == factors[500] == factors[800] == 1.0
    assert factors[900] == pytest.approx(0.5)
    assert 0 < factors[999] < 0.01
    assert config.snapshot_steps() == [0, 10, 100, 1000]
    assert math.ceil(CONFIG.tokens / 128) == CONFIG.steps == 50


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "empty"),
        ([member(1, k=25)], "k 25 with d_sae 24"),
        ([member(1), member(1)], "identical"),
    ],
)
def test_impossible_members_are_refused(make_store, planted, tmp_path, members, message):
    with pytest.raises(BadInput, match=message):
        train(make_store(planted[0]), members, CONFIG, CPU, tmp_path / "s")


def test_constant_activations_and_divergence_are_refused(make_store, planted, tmp_path):
    with pytest.raises(BadInput, match="all rows are equal"):
        train(make_store(torch.ones(300, 4), name="constant"), [member(1)], CONFIG, CPU, tmp_path / "s")
    with pytest.raises(BadInput, match="seed 1 diverged"):
        train(make_store(planted[0]), [member(1, rate=1e30)], CONFIG, CPU, tmp_path / "s")
