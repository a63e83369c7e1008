"""The subject: no answer in its input, a seeded split, a Fourier ground truth that adds up."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from husai.runs.errors import BadInput, CheckFailed
from husai.runs.files import digest
from husai.subjects import modular_addition as ma

CPU = torch.device("cpu")
SMALL = ma.ModularAdditionConfig(modulus=23, d_model=16, n_heads=2, d_mlp=32, epochs=2)


def test_permuting_the_labels_changes_no_input_token():
    a, b = ma.pairs(113)
    answer = (a + b) % 113
    permuted = answer[torch.randperm(len(answer), generator=torch.Generator().manual_seed(0))]
    config = ma.ModularAdditionConfig()
    assert torch.equal(ma.tokens(config, a, b, answer), ma.tokens(config, a, b, permuted))
    leaky = dataclasses.replace(config, layout="published")
    assert not torch.equal(ma.tokens(leaky, a, b, answer), ma.tokens(leaky, a, b, permuted)), "its input does hold it"


def test_the_model_reads_nothing_but_its_tokens():
    """The logits at "=" of the seven-token layout cannot see the answer that follows (causal attention)."""
    config = dataclasses.replace(SMALL, layout="published")
    model = ma.build_model(config)
    x, _, _, _ = ma.dataset(config)
    other = x.clone()
    other[:, 5] = (other[:, 5] + 1) % 23
    at = config.answer_position
    assert torch.equal(model(x[:50])[:, at], model(other[:50])[:, at])
    assert not torch.equal(model(x[:50])[:, at + 1], model(other[:50])[:, at + 1])


@pytest.mark.parametrize("layout", ["equals", "published"])
def test_logits_at_the_answer_are_those_of_the_whole_pass(layout):
    config = dataclasses.replace(SMALL, layout=layout, n_layers=2)
    model = ma.build_model(config).double()
    x, _, _, _ = ma.dataset(config)
    whole = model(x[:50])[:, config.answer_position]
    torch.testing.assert_close(ma.answer_logits(model, config, x[:50]), whole, rtol=0, atol=1e-12)


def test_split_is_seeded_disjoint_and_whole():
    x, y, train, heldout = ma.dataset(SMALL)
    assert sorted(torch.cat([train, heldout]).tolist()) == list(range(23 * 23))
    assert len(train) == int(0.8 * 23 * 23)
    assert torch.equal(y, (x[:, 0] + x[:, 1]) % 23)
    assert torch.equal(train, ma.dataset(SMALL)[2])
    assert not torch.equal(train, ma.dataset(dataclasses.replace(SMALL, seed=1))[2])


def test_fourier_basis_is_orthonormal_with_each_frequency_once():
    basis = ma.fourier_basis(113)
    assert basis.shape == (113, 113)
    torch.testing.assert_close(basis @ basis.T, torch.eye(113, dtype=torch.float64), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="even"):
        ma.fourier_basis(10)


@given(
    st.lists(st.integers(1, 56), min_size=5, max_size=5, unique=True),
    st.lists(st.floats(0.5, 4), min_size=5, max_size=5),
    st.floats(0, 2),
)
@settings(max_examples=25, deadline=None)
def test_planted_frequencies_get_exactly_their_share(frequencies, amplitudes, noise):
    """cos and sin of five frequencies along orthonormal directions: the power of each is amplitude² · p."""
    n = torch.arange(113, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(128, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[
        0
    ].T
    embedding = torch.zeros(113, 128, dtype=torch.float64) + 7.0 * directions[10]  # a constant, which has no frequency
    for i, (f, amplitude) in enumerate(zip(frequencies, amplitudes, strict=True)):
        angle = 2 * torch.pi * f * n / 113
        embedding += amplitude * (
            torch.outer(angle.cos(), directions[2 * i]) + torch.outer(angle.sin(), directions[2 * i + 1])
        )
    other = next(f for f in range(1, 57) if f not in frequencies)
    embedding += noise * 0.2 * torch.outer((2 * torch.pi * other * n / 113).cos(), directions[11])

    power = ma.fourier_power(embedding)
    torch.testing.assert_close(power.sum(), embedding.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(power[0], torch.tensor(49.0 * 113, dtype=torch.float64))
    for f, amplitude in zip(frequencies, amplitudes, strict=True):
        assert power[f].item() == pytest.approx(amplitude**2 * 113, rel=1e-9)
    extra = (noise * 0.2) ** 2 * 113 / 2
    expected = sum(a**2 * 113 for a in amplitudes) / (sum(a**2 * 113 for a in amplitudes) + extra)
    found, share = ma.key_frequencies(embedding, 5)
    assert found == sorted(frequencies)
    assert share == pytest.approx(expected, rel=1e-9)


@pytest.mark.nightly  # the smoke run and the queue train it, and fail where it does not solve the task
def test_the_default_transformer_solves_the_task_and_the_kept_model_is_the_one_that_held():
    config = ma.ModularAdditionConfig()
    model, training = ma.train(config, CPU)
    assert training["solved"]
    last = [h["heldout_accuracy"] for h in training["history"][-config.hold_epochs :]]
    assert min(last) >= config.target_accuracy
    x, y, _, heldout = ma.dataset(config)
    loss, accuracy = ma.evaluate(model, config, x[heldout], y[heldout])
    assert (loss, accuracy) == (training["heldout_loss"], training["heldout_accuracy"])
    assert accuracy == last[-1]
    _, share = ma.key_frequencies(model.embed.W_E[:113].detach())
    _, untrained = ma.key_frequencies(ma.build_model(config).embed.W_E[:113].detach())
    assert share > 2 * untrained, "training concentrates the embedding on few frequencies"


def test_an_unsolved_model_is_not_published(tmp_path):
    with pytest.raises(CheckFailed, match=r"\b2 epochs\b.*\b0\.999\b"):
        ma.train_or_find(SMALL, tmp_path, CPU, 1)
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and not p.name.startswith(".")]


def test_subject_round_trip(small_subject):
    _, folder = small_subject
    model, config, description = ma.load(folder)
    x, y, _, heldout = ma.dataset(config)
    assert ma.evaluate(model, config, x[heldout], y[heldout])[0] == description["training"]["heldout_loss"]
    assert len(description["digest"]) == 64
    again = ma.train_or_find(config, folder.parent, CPU, 1)
    assert again == folder


def edited(folder, tmp_path, edit):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit(copy)
    return copy


def rewrite(change, signed=True):
    """Change what describes a subject, its own digest with it."""

    def edit(folder):
        description = json.loads((folder / "subject.json").read_text())
        change(description)
        if signed:
            description.pop("sha256")
            description["sha256"] = digest(description)
        (folder / "subject.json").write_text(json.dumps(description))

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
            r"model\.safetensors .*sha256",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors .*sha256"),
        (lambda f: (f / "subject.json").unlink(), r"subject\.json [^(]*$"),
        (lambda f: (f / "subject.json").write_text("[]"), r"subject\.json [^(]*$"),
        (rewrite(lambda d: d.update(kind="gpt2")), r"subject\.json [^(]*$"),
        (rewrite(lambda d: d.pop("training")), r"subject\.json .*\('training'\)"),
        (rewrite(lambda d: d["training"].update(epochs=3), signed=False), r"subject\.json .*\([^']*\)$"),
        (rewrite(lambda d: d.pop("sha256"), signed=False), r"subject\.json .*\('sha256'\)"),
        (rewrite(lambda d: d["config"].update(surprise=1)), r"subject\.json .*'surprise'"),
        (rewrite(lambda d: d["config"].update(d_model="x")), r"subject\.json .*\bd_model\b.*'x'"),
        (rewrite(lambda d: d["config"].update(d_model=-4)), r"model\.safetensors .*-4\b"),
        (rewrite(lambda d: d.update(training=[])), r"subject\.json .*\("),
        (rewrite(lambda d: d["config"].update(d_mlp=64)), r"(?s)model\.safetensors .*\b64\b"),
        (rewrite(lambda d: d["training"].update(solved=False)), r"copy .*\b0\.\d{4}\b.*\b0\.0\b"),
    ],
)
def test_bad_subjects_are_refused(small_subject, tmp_path, edit, named):
    with pytest.raises(BadInput, match=named):
        ma.load(edited(small_subject[1], tmp_path, edit))
