"""The sparse parts of a step: numba against plain PyTorch, and both against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from husai.kernels import cpu, cpu_kernels, dense, sparse
from husai.kernels.sparse import Choice, encode, reconstruct
from husai.kernels.workers import deal, spans

N, ROWS, D_IN, D_SAE = 3, 90, 20, 70
CHOICES = {
    "rows": Choice((5, 8, 12)),
    "batch": Choice((5, 8, 12), across_batch=True),
    "proposed": Choice((5, 8, 12), propose=True),
    "all": Choice((D_SAE,) * 3),
}


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    names = {
        "W_enc": draw(N, D_SAE, D_IN).transpose(1, 2),
        "b_enc": draw(N, D_SAE),
        "b_dec": draw(N, D_IN),
        "W_dec": draw(N, D_SAE, D_IN),
        "target": draw(N, ROWS, D_IN),
    }
    return {name: t.requires_grad_() for name, t in names.items()}, draw(N, ROWS, D_IN)


def outcome(backend, choice, dtype, monkeypatch):
    """Everything that a step gets from a backend: values in place, residual, activity and all gradients."""
    monkeypatch.setattr(sparse, "backend", lambda device_type: backend)
    p, x = inputs(dtype)
    values, kept = encode(p["W_enc"], p["b_enc"], p["b_dec"], x, choice)
    squares, error = reconstruct(values, p["W_dec"], p["b_dec"], p["target"], kept)
    (squares * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    fired, active = kept.activity()
    found = {"kept": kept.dense(), "squares": squares, "error": error, "fired": fired, "active": active}
    return found | {"smallest": kept.smallest()} | {f"{name}.grad": t.grad for name, t in p.items()}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numba_and_pytorch_give_the_same(choice, dtype, monkeypatch):
    ours, plain = (outcome(b, choice, dtype, monkeypatch) for b in (cpu, dense))
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    for name, expected in plain.items():
        a, b = (t.detach().double().nan_to_num(posinf=0.0) for t in (ours[name], expected))  # inf: nothing kept at all
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name


def test_the_number_of_threads_changes_no_byte(monkeypatch):
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(outcome(cpu, CHOICES["proposed"], torch.float32, monkeypatch))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in ("kept", "error", "W_enc.grad", "W_dec.grad"))


@pytest.mark.parametrize("backend", [cpu, dense])
def test_choices_against_numpy(backend):
    p, x = inputs(torch.float64)
    W, bias = p["W_enc"].detach().transpose(1, 2), p["b_enc"].detach()
    pre = np.einsum("nrd,nfd->nrf", x.numpy(), W.numpy()) + bias.numpy()[:, None]
    for name, choice in CHOICES.items():
        found = backend.select(x, W, bias, choice).dense().numpy()
        for i, k in enumerate(choice.k):
            candidates = pre[i]
            if choice.across_batch:
                threshold = np.sort(candidates, axis=None)[-k * ROWS]
                expected = np.where((candidates >= threshold) & (candidates > 0), candidates, 0)
            else:
                order = np.argsort(-candidates, axis=1)[:, :k]
                expected = np.zeros_like(candidates)
                top = np.take_along_axis(candidates, order, 1)
                np.put_along_axis(expected, order, np.maximum(top, 0), 1)
            np.testing.assert_allclose(found[i], expected, atol=1e-10, err_msg=f"{name} {i}")


finite = st.floats(-100, 100, width=32)


@settings(deadline=None, max_examples=150)
@given(
    pre=st.tuples(st.integers(1, 4), st.integers(1, 300)).flatmap(
        lambda shape: arrays(np.float32, shape, elements=finite | st.sampled_from([0.0, 1.0, -1.0]))
    ),
    k=st.integers(1, 40),
)
def test_top_k_keeps_the_largest_whatever_the_row(pre, k):
    """Ties, rows of equal values, rows without positive values, k as large as the row."""
    k = min(k, pre.shape[1])
    features, values = np.zeros((len(pre), k), np.int32), np.zeros((len(pre), k), np.float32)
    counts = np.zeros(len(pre), np.int64)
    cpu_kernels.top_k(pre, k, features, values, counts)
    assert (values[np.arange(k) >= counts[:, None]] == 0).all()
    expected = np.maximum(-np.sort(-pre, axis=1)[:, :k], 0)
    np.testing.assert_array_equal(-np.sort(-values, axis=1), expected)
    for row, f, v in zip(pre, features, values, strict=True):
        kept = v > 0
        assert len(set(f[kept])) == kept.sum(), "no feature twice"
        np.testing.assert_array_equal(row[f[kept]], v[kept])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.sampled_from([40, 300, 1000]),
    d_in=st.sampled_from([3, 64, 256]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    shift=st.sampled_from([0.0, 3.0]),
    k=st.sampled_from([1, 8, 32]),
)
def test_proposals_of_a_bfloat16_product_hold_all_that_float32_keeps(seed, width, d_in, scale, shift, k):
    """The bound is a proof; this tries inputs that would show a gap in it: offsets, small and large scales, biases."""
    g = torch.Generator().manual_seed(seed)
    x = scale * (torch.randn(1, 30, d_in, generator=g) + shift)
    W = torch.randn(1, width, d_in, generator=g) * torch.rand(1, width, 1, generator=g)
    bias = scale * torch.randn(1, width, generator=g)
    proposed = cpu.select(x, W, bias, Choice((k,), propose=True)).dense()[0]
    exact = torch.addmm(bias[0].double(), x[0].double(), W[0].double().T)
    kth = exact.topk(k, dim=1).values[:, -1:].clamp_min(0)
    rounding = 1e-5 * (x[0].norm(dim=1, keepdim=True) * W[0].norm(dim=1).max() + bias.abs().max())
    surely = exact > kth + rounding  # no float32 product could leave these out
    assert (proposed[surely] > 0).all()
    assert (exact[proposed > 0] > (kth - rounding).expand_as(exact)[proposed > 0]).all()


def test_rounding_is_bfloat16s():
    x = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 37)
    rounded = cpu.Rounded(x)
    assert torch.equal(rounded.bits, x.bfloat16())
    torch.testing.assert_close(rounded.norms, x.bfloat16().float().norm(dim=1))
    torch.testing.assert_close(rounded.errors, (x - x.bfloat16().float()).norm(dim=1))


@pytest.mark.parametrize("unit", [False, True])
def test_adam_against_torch(unit):
    g = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(2, 5, 7, generator=g, dtype=torch.float64), dim=-1)
    ours, plain, theirs = start.clone(), start.clone(), start.clone().requires_grad_()
    moments = [torch.zeros_like(start) for _ in range(4)]
    rate = torch.tensor([1e-2, 1e-3])
    optimisers = [torch.optim.AdamW([theirs], lr=float(r), weight_decay=0.1, eps=1e-8) for r in rate]
    for step in range(1, 6):
        gradient = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
        corrections = torch.tensor([1 - 0.9**step, 1 - 0.999**step], dtype=torch.float64)
        cpu.adam(ours, gradient, *moments[:2], rate, 0.1, (0.9, 0.999), corrections, unit)
        dense.adam(plain, gradient.clone(), *moments[2:], rate, 0.1, (0.9, 0.999), corrections, unit)
        if not unit:
            before = theirs.detach().clone()
            theirs.grad = gradient
            optimisers[0].step()
            moved = theirs.detach().clone()
            torch.testing.assert_close(ours[0], moved[0])
            assert not torch.equal(before, moved)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    if unit:
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(2, 5, dtype=torch.float64))


def test_dealt_work_raises_its_first_error():
    before, done = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            deal(lambda i: done.append(1 / i), [(1,), (0,), (2,)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert list(spans(7, 3)) == [(0, 3), (3, 6), (6, 7)]
