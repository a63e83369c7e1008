"""The stacked trainer, against plain references."""

import math
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import husai.training.trainer as trainer
import processes
from husai.activations.order import BatchReader
from husai.dictionaries.families import FAMILIES, SAE_FAMILIES
from husai.dictionaries.sae import SAE
from husai.runs.errors import BadInput
from husai.training import memory
from husai.training.stack import Member
from husai.training.trainer import Scaling, TrainingConfig, evaluate, folded, geometric_median, train

CPU = torch.device("cpu")


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


def member(seed, d_sae=24, k=3, rate=3e-3, order=None, family="topk"):
    return Member(seed, d_sae, k, rate, seed if order is None else order, family)


def state(trained):
    return torch.cat([p.flatten() for t in trained for p in t.sae.weights.values()])


@pytest.mark.parametrize("family", SAE_FAMILIES)
def test_stacked_run_equals_separate_runs(make_store, planted, tmp_path, family):
    """float64, 50 steps: members that differ in seed, k, rate, width and order, with AuxK at work, beside another
    family."""
    store = make_store(planted[0])
    members = [
        member(1, family=family),
        member(2, k=5, family=family),
        member(3, rate=1e-3, family=family),
        member(4, d_sae=40, family=family),
        member(5, order=1, family=family),
        member(6, 40, 1, family=family),
        member(6, family="relu" if family == "topk" else "topk"),
    ]
    stacked, steps = train(store, members, CONFIG, CPU, tmp_path / "s", dtype=torch.float64)
    assert FAMILIES[family].PENALISED or any(t.aux_steps for t in stacked)
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
    members = [member(1), member(2, d_sae=40), member(1, family="jumprelu"), member(2, family="matryoshka")]
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
    assert [str(tmp_path / "state") in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [True]
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


def test_evaluate_against_numpy(make_store, planted, tmp_path):
    x = planted[0] * 3 + 5
    store = make_store(x)
    (t,), _ = train(store, [member(1)], CONFIG, CPU, tmp_path / "s")
    held = x[4800:].double().numpy()
    features = t.sae.encode(x[4800:])
    error = held - t.sae.decode(features).double().numpy()
    figures, rate = evaluate(t.sae, store, range(4800, 6000), batch=500)
    assert figures.explained_variance == pytest.approx(
        1 - (error**2).sum() / ((held - held.mean(0)) ** 2).sum(), abs=1e-5
    )
    assert figures.mse == pytest.approx((error**2).mean(), rel=1e-5)
    active = features.numpy() > 0
    assert figures.l0 == pytest.approx(active.sum(1).mean())
    assert figures.dead_share == pytest.approx((~active.any(0)).mean())
    np.testing.assert_allclose(rate, active.mean(0))
    assert figures.l0 <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_is_folded_exactly(family):
    """The trained SAE on scaled activations and what `folded` returns are the same map, in other units."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weights = {"W_enc": draw(6, 10), "W_dec": draw(10, 6), "b_dec": draw(6), "b_enc": draw(10)}
    architecture = FAMILIES[family].ARCHITECTURE
    if "jumprelu" in architecture:
        weights["threshold"] = draw(10).abs()
    if architecture == "gated":
        del weights["b_enc"]
        weights |= {"b_gate": draw(10), "b_mag": draw(10), "r_mag": draw(10)}
    if "skip" in architecture:
        weights["W_skip"] = draw(6, 6)
    transcoder = "transcoder" in architecture
    x_scaling = Scaling(draw(6), 4.0)
    y_scaling = Scaling(draw(6), 0.3) if transcoder else x_scaling
    inside = {name: t.T if name == "W_skip" else t for name, t in weights.items()}
    inner = SAE(inside, architecture, 3, subtract_b_dec=not transcoder)
    outer = folded(weights, architecture, 3, x_scaling, y_scaling)

    x = draw(200, 6)
    scaled = x_scaling(x)
    features = inner.encode(scaled)
    assert 0 < (features > 0).double().mean() < 1
    torch.testing.assert_close(outer.encode(x) * y_scaling.scale, features)
    torch.testing.assert_close(y_scaling(outer.decode(outer.encode(x), x)), inner.decode(features, scaled))


def test_schedules():
    config = TrainingConfig(tokens=1000 * 10, batch_size=10, warmup_fraction=0.1, decay_fraction=0.2, snapshots=4)
    factors = [config.learning_rate_factor(s) for s in range(1000)]
    assert factors[0] == 0.01
    assert factors[99] == factors[500] == factors[800] == 1.0
    assert factors[900] == pytest.approx(0.5)
    assert 0 < factors[999] < 0.01
    assert config.snapshot_steps() == [0, 10, 100, 667, 834, 1000], "two in the last third, for a slope"
    assert replace(config, tokens=10).snapshot_steps() == [0, 1]
    assert math.ceil(CONFIG.tokens / 128) == CONFIG.steps == 50


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([], "empty"),
        ([member(1, k=25)], "k 25 .*d_sae 24"),
        ([member(1), member(1)], "identical"),
        ([member(1, family="vq")], "'vq'.* topk"),
        ([member(1, family="transcoder")], "transcoders"),
    ],
)
def test_impossible_members_are_refused(make_store, planted, tmp_path, members, named):
    with pytest.raises(BadInput, match=named):
        train(make_store(planted[0]), members, CONFIG, CPU, tmp_path / "s")


def test_constant_activations_and_divergence_are_refused(make_store, planted, tmp_path):
    with pytest.raises(BadInput, match=f"{tmp_path / 'constant'}: "):
        train(make_store(torch.ones(300, 4), name="constant"), [member(1)], CONFIG, CPU, tmp_path / "s")
    store, target = make_store(planted[0]), make_store(planted[0], name="target")
    for family in FAMILIES:
        other = target if "transcoder" in family else None
        with pytest.raises(BadInput, match=r"\bseed 1\b.*--learning-rate"):
            train(store, [member(1, rate=1e30, family=family)], CONFIG, CPU, tmp_path / "s", target=other)
    x = planted[0].clone()
    x[-1200:] = 1.0
    constant = make_store(x, name="constant heldout")
    trained, _ = train(constant, [member(1)], CONFIG, CPU, tmp_path / "s")
    with pytest.raises(BadInput, match=rf"{constant.folder}: .*\b1200\b"):
        evaluate(trained[0].sae, constant, constant.split(0.2)[1])


def test_an_sae_too_large_for_the_machine_is_refused():
    with pytest.raises(BadInput, match=r"d_sae 400000000: .*GiB"):
        memory.passes([member(1, d_sae=4 * 10**8)], memory.Sizes(128, 128, 1024, 8), CPU)


def test_a_grid_too_large_for_memory_is_divided_and_gives_the_same(make_store, planted, tmp_path, monkeypatch):
    store = make_store(planted[0])
    members = [member(s, family=f) for f in ("topk", "batchtopk", "relu") for s in (1, 2, 3)]
    whole, _ = train(store, members, CONFIG, CPU, tmp_path / "s")
    kinds = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    sizes = memory.Sizes(16, 16, 128, 8)
    assert memory.stacks(members, sizes, CPU) == kinds
    assert memory.passes(members, sizes, CPU) == [list(range(9))]
    monkeypatch.setattr(memory, "budget", lambda device: 2 * 2 * memory.state_bytes(members[0], sizes, CPU))
    monkeypatch.setattr(memory, "step_bytes", lambda m, sizes: 1)
    assert memory.passes(members, sizes, CPU) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    monkeypatch.setattr(memory, "budget", lambda device: 1)
    divided, _ = train(store, members, CONFIG, CPU, tmp_path / "s")
    for a, b in zip(whole, divided, strict=True):
        torch.testing.assert_close(state([a]), state([b]), rtol=1e-4, atol=1e-5)


def test_transcoders_learn_a_map_between_two_hooks(make_store, planted, tmp_path):
    """A target that a linear map and known features make up: both kinds explain it, the skip does the linear part."""
    x, _ = planted
    g = torch.Generator().manual_seed(1)
    y = (x @ torch.randn(16, 24, generator=g)).relu() @ torch.randn(24, 12, generator=g) + 3
    source, target = make_store(x), make_store(y, name="target")
    config = TrainingConfig(tokens=100_000, batch_size=256)
    members = [member(s, d_sae=48, k=6, family=f) for f in ("transcoder", "skip_transcoder") for s in (1, 2)]
    trained, _ = train(source, members, config, CPU, tmp_path / "s", target=target)
    rows = source.split(0.2)[1]
    explained = [evaluate(t.sae, source, rows, target)[0].explained_variance for t in trained]
    assert min(explained[:2]) > 0.5
    assert min(explained[2:]) > max(explained[:2]), "a skip connection can only help here"
    with pytest.raises(BadInput, match=f"{tmp_path / 'short'} "):
        train(source, members, config, CPU, tmp_path / "s", target=make_store(y[:-1], name="short"))
    other_order = make_store(y, name="other order", row_seed=7)
    with pytest.raises(BadInput, match=f"{other_order.folder} "):
        train(source, members, config, CPU, tmp_path / "s", target=other_order)
    with pytest.raises(BadInput, match="transcoders"):
        train(source, [member(1)], config, CPU, tmp_path / "s", target=target)


MEASURE = """
import resource, sys, torch
from pathlib import Path
from husai.activations.store import ActivationStore, StoreWriter
from husai.training.stack import Member
from husai.training.trainer import TrainingConfig, train
torch.set_num_threads(1)
folder = Path(sys.argv[1])
writer = StoreWriter(folder, 64)
g = torch.Generator().manual_seed(0)
for _ in range(int(sys.argv[2])):
    writer.append(torch.randn(10_000, 64, generator=g))
writer.finish(subject="s", subject_digest="0" * 64, hook_name="h", position="0", row_seed=0, control=None)
store = ActivationStore.open(folder)
config = TrainingConfig(tokens=len(store.split(0.2)[0]), batch_size=4096)  # one epoch: every row is read
train(store, [Member(s, 64, 4, 1e-3, 0) for s in (1, 2)], config, torch.device("cpu"), folder / "state")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """From ten windows on: 307 MB more on disk, less than a tenth of that more in memory."""
    # What is freed is given back at once, so that the peak is what was needed and not what the allocator kept.
    strict = {"THP_MEM_ALLOC_ENABLE": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    peaks = []
    for name, parts in (("small", "60"), ("large", "180")):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", MEASURE, tmp_path / name, parts]
        done = processes.run(command, env=os.environ | strict)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks
