"""Decoders compared without a model: shipped SAEs, bare arrays, and bad input."""

import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from husai.dictionaries import decoders
from husai.runs.errors import BadInput
from husai.runs.files import REPOSITORY

SCRIPT = "scripts/analysis/compare_decoders.py"
SHIPPED = REPOSITORY / "assets" / "husai-tiny-saes"
MOMENTS = REPOSITORY / "assets" / "husai-tiny-saes-activations.safetensors"
README = REPOSITORY / "README.md"


def test_the_readme_shows_what_the_shipped_saes_give(run_script):
    code, out, err = run_script(SCRIPT, *sorted(SHIPPED.iterdir()), "--covariance", MOMENTS)
    assert code == 0, err
    shown = [line for line in README.read_text().splitlines() if re.match(r"\| (mcc|pwmcc|share70) \|", line)]
    assert len(shown) == 3
    assert all(line in out for line in shown)
    rows = [line.split(" | ") for line in out.splitlines() if "seed" in line]
    none, everywhere = (float(np.mean([int(re.sub(r"\D", "", row[i])) for row in rows])) for i in (2, 4))
    assert f"about {round(none, -1):.0f}\nrecur in no other" in README.read_text()
    assert everywhere == pytest.approx(25, abs=1)
    assert "| certified" not in out


def test_two_saes_have_no_interval_and_widths_are_remarked(run_script, matrix, tmp_path):
    np.save(tmp_path / "a.npy", matrix)
    np.save(tmp_path / "b.npy", np.random.default_rng(1).normal(size=(12, 4)).astype(np.float32))
    code, out, err = run_script(SCRIPT, tmp_path / "a.npy", tmp_path / "b.npy", "--rows-are-features", "yes")
    assert code == 0, err
    assert "95 % interval" not in out
    assert "from 9 to 12 features" in out
    assert "| certified" not in out


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def test_every_kind_of_file_gives_the_same_directions(matrix, tmp_path):
    np.save(tmp_path / "a.npy", matrix)
    np.save(tmp_path / "turned.npy", matrix.T)
    torch.save({"W": torch.from_numpy(matrix), "bias": torch.zeros(4)}, tmp_path / "a.pt")
    save_file({"W": torch.from_numpy(matrix)}, tmp_path / "a.safetensors")
    for name, rows in (("a.npy", True), ("turned.npy", False), ("a.pt", True), ("a.safetensors", True)):
        assert np.array_equal(decoders.read_decoder(tmp_path / name, rows).numpy(), matrix)
    weights = load_file(SHIPPED / "seed42" / "sae_weights.safetensors")
    assert torch.allclose(decoders.read_decoder(SHIPPED / "seed42"), weights["W_dec"], atol=1e-5)


def test_bad_files_are_refused_and_run_nothing(matrix, tmp_path):
    np.save(tmp_path / "a.npy", matrix)
    (tmp_path / "b.pt").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "harm").encode() + b"'\ntR.")
    with open(tmp_path / "c.npy", "wb") as file:
        pickle.dump({"W": 1}, file)
    np.save(tmp_path / "d.npy", np.ones((3, 4), dtype=int))
    torch.save([1, 2], tmp_path / "e.pt")
    with pytest.raises(BadInput, match="--rows-are-features"):
        decoders.read_decoder(tmp_path / "a.npy")
    for name in ("b.pt", "c.npy", "d.npy", "e.pt", "missing.npy"):
        with pytest.raises(BadInput, match=name):
            decoders.read_decoder(tmp_path / name, True)
    assert not (tmp_path / "harm").exists()


def test_a_covariance_that_does_not_fit_ends_in_one_line(refused, matrix, tmp_path):
    np.save(tmp_path / "wide.npy", np.eye(5))
    refused("covariance", SCRIPT, SHIPPED / "seed42", SHIPPED / "seed123", "--covariance", tmp_path / "wide.npy")
