"""docs/api.md is what the docstrings say, and its examples run."""

import doctest
import runpy

import numpy as np
import pytest

import husai
from conftest import ROOT
from husai.evidence.features import COLUMNS

API = runpy.run_path(str(ROOT / "scripts/analysis/write_api.py"), run_name="loaded")


def test_the_page_is_what_the_docstrings_say():
    assert API["page"]() == (ROOT / "docs/api.md").read_text(), "make api"


@pytest.mark.parametrize("name", ["husai:__doc__", *(name for names in API["PUBLIC"].values() for name in names)])
def test_examples_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    thing = husai if name == "husai:__doc__" else API["public"](name)
    text = thing.__doc__
    assert text, f"{name} has no docstring"
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_feature_table_without_a_model():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(12, 16))
    decoders = [np.vstack([shared, rng.normal(size=(4, 16))]) for _ in range(6)]
    alone = husai.compare(decoders).table(1)
    found = husai.compare(decoders, covariance=np.eye(16), token_means=shared[:2]).table(1)
    assert list(alone["recurs"][:12]) == [5] * 12
    assert alone["certified"][:12].all()
    assert not alone["certified"][12:].any()
    assert set(alone) < set(found) < set(COLUMNS)
    for name, dtype in found.dtypes.items():
        assert str(dtype) == COLUMNS[name].dtype
    assert [*found] == [name for name in COLUMNS if name in found]
    assert (found["prototype_cosine"][:2] > 0.999).all()
