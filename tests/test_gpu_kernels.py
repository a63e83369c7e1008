"""The Triton kernels, run by Triton's interpreter on the CPU, against plain PyTorch."""

import pytest
import torch

from husai.dictionaries.family import Shape
from husai.kernels import dense, sparse
from husai.kernels.sparse import Choice, encode, reconstruct
from husai.training import stack

pytest.importorskip("triton", reason="pip install --no-deps -r requirements-bench.txt")
from husai.kernels import gpu

N, ROWS, D_IN, D_SAE = 2, 12, 10, 18


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g)


def outcome(backend, choice, shared, monkeypatch):
    monkeypatch.setattr(sparse, "backend", lambda device_type: backend)
    randn = draw()
    p = {
        "W_enc": randn(N, D_SAE, D_IN).transpose(1, 2),
        "b_enc": randn(N, D_SAE),
        "b_dec": randn(N, D_IN),
        "W_dec": randn(N, D_SAE, D_IN),
    }
    p = {name: t.requires_grad_() for name, t in p.items()}
    x = randn(1, ROWS, D_IN).expand(N, -1, -1) if shared else randn(N, ROWS, D_IN)
    values, kept = encode(p["W_enc"], p["b_enc"], p["b_dec"], x, choice)
    squares, error = reconstruct(values, p["W_dec"], p["b_dec"], x, kept)
    (squares * torch.tensor([1.0, 2.0])).sum().backward()
    fired, active = kept.activity()
    found = {"kept": kept.dense(), "squares": squares, "error": error, "fired": fired.float(), "active": active}
    return found | {name: t.grad for name, t in p.items()}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        Choice((3, 5)),
        Choice((3, 5), propose=True),
        Choice((3, 5), across_batch=True),
    ],
    ids=["rows", "proposed", "batch"],
)
def test_interpreted_kernels_equal_pytorch(choice, shared, monkeypatch):
    ours, plain = (outcome(backend, choice, shared, monkeypatch) for backend in (gpu, dense))
    for name, expected in plain.items():
        difference = (ours[name].detach().float() - expected.detach().float()).abs().max()
        assert difference <= 1e-5 * max(1.0, expected.detach().float().abs().max()), name


def test_a_product_in_pieces_is_the_same(monkeypatch):
    whole = outcome(gpu, Choice((3, 5)), False, monkeypatch)
    monkeypatch.setattr(gpu, "PRODUCT_BYTES", 4 * N * D_SAE * 5)
    pieces = outcome(gpu, Choice((3, 5)), False, monkeypatch)
    torch.testing.assert_close(whole["kept"], pieces["kept"])


@pytest.mark.parametrize("unit", [False, True])
def test_interpreted_adam_equals_pytorch(unit):
    randn = draw()
    start = torch.nn.functional.normalize(randn(2, 5, 7), dim=-1)
    ours, plain = start.clone(), start.clone()
    moments = [torch.zeros_like(start) for _ in range(4)]
    rate = torch.tensor([1e-2, 1e-3])
    for step in range(1, 4):
        gradient, corrections = randn(2, 5, 7), torch.tensor([1 - 0.9**step, 1 - 0.999**step])
        gpu.adam(ours, gradient, *moments[:2], rate, 0.1, (0.9, 0.999), corrections, unit)
        dense.adam(plain, gradient, *moments[2:], rate, 0.1, (0.9, 0.999), corrections, unit)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("family", ["topk", "matryoshka", "jumprelu"])
def test_a_stack_on_the_interpreted_kernels_takes_the_same_steps(family, monkeypatch):
    def run(backend) -> dict:
        for module in (sparse, stack):
            monkeypatch.setattr(module, "backend", lambda device_type: backend)
        members = [stack.Member(s, 12, 2, 3e-3, 0, family) for s in (1, 2)]
        s = stack.Stack(members, Shape(6, 6, 12), torch.device("cpu"), torch.float32)
        settings = stack.StepSettings((0.9, 0.999), 0.0, 1 / 32, 15, False)
        s.silent[:, :3] = 100  # dead from the start: AuxK is at work
        randn = draw(1)
        for step in range(3):
            x = randn(1, 10, 6).expand(2, -1, -1)
            s.step(x, x, step, 1.0, settings)
        return {name: t.detach().clone() for name, t in s.state()}

    ours, plain = run(gpu), run(dense)
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
