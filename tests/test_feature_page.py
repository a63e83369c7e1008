"""The page of a feature table: it holds what the table holds, stays usable with many rows, and lets no text act."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser import CHROMIUM, browse, with_script
from conftest import ROOT
from husai.evidence import rules
from husai.evidence.features import COLUMNS, FeatureReliability
from husai.report.feature_summary import summary_lines
from husai.report.features import embedded, encoded, feature_page, tiles, within

CONFIRMED = ROOT / "docs" / "evidence" / "embedded_queue" / "candidate_confirmation" / "results.json"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
SIBLINGS = 14


def table(n: int, seed: int = 0) -> pd.DataFrame:
    """A feature table with a value of each kind in every column."""
    g = np.random.default_rng(seed)
    made = {
        "float64": lambda: g.random(n),
        "Float64": lambda: np.where(g.random(n) < 0.2, np.nan, g.random(n)),
        "int64": lambda: g.integers(0, n, n),
        "Int64": lambda: np.where(g.random(n) < 0.2, np.nan, g.integers(0, n, n)),
        "boolean": lambda: np.where(g.random(n) < 0.2, None, g.random(n) < 0.5),
        "string": lambda: np.where(g.random(n) < 0.2, None, " the"),
    }
    found = pd.DataFrame({name: pd.Series(made[c.dtype](), dtype=c.dtype) for name, c in COLUMNS.items()})
    found["feature"], found["siblings"] = np.arange(n), SIBLINGS
    found["recurs"] = g.integers(0, SIBLINGS + 1, n)
    found["statement"] = pd.Series(g.choice(list(rules.STATEMENTS), n), dtype="string")
    return found


def results(features: pd.DataFrame, origin: str = "trained", **changed) -> dict:
    record = json.loads(CONFIRMED.read_text())["bank"]["saes"][0]
    record.pop("core")
    share = {"estimate": 0.4, "low": 0.3, "high": 0.5, "standard_error": 0.05, "n_seeds": SIBLINGS}
    share |= {"method": "mean over seeds", "reason": None}
    sibling = {"origin": origin, "checkpoint_sha256": "a" * 64, "d_sae": len(features)}
    sibling["heldout"] = record["heldout"]
    counts = {name: int((features["statement"] == name).sum()) for name in rules.STATEMENTS}
    return {
        "phase": "feature_reliability",
        "inputs": {},
        "subject": "husai-tiny",
        "hook_name": "blocks.1.hook_resid_pre",
        "text": None,
        "sae": record,
        "siblings": [sibling | {"label": f"seed{i}", "partners": 0.5} for i in range(SIBLINGS)],
        "training": None,
        "bars": {},
        "heldout_tokens": 1000,
        "rotations": 20,
        "gaussian": SIBLINGS,
        "statements": counts,
        "alive": len(features) - counts["dead"],
        "recur": share,
        "recur_others": None,
        "certified": 0.2,
        "above_chance": {"marked": 0, "features": 236, "prototypes_marked": 18, "prototypes": 20},
        "deciles": [{"low": 0.1, "high": 0.2, "features": 10, "recur": share}],
        "in_every": [0.2] * SIBLINGS,
        "in_some": [0.6] * SIBLINGS,
        "differs": False,
        "among_siblings": [0.5] * SIBLINGS,
        "limits": [],
        "notes": [],
        "table_sha256": "b" * 64,
    } | changed


def context(text: str = " word", pieces: int = 20) -> dict:
    return {"text": [text] * pieces, "values": [0.0] * (pieces - 1) + [2.5]}


def contexts(features, text: str = " word") -> dict:
    partner = {"sibling": "seed3", "feature": 7, "cosine": 0.87, "contexts": [context(" partner")]}
    return {str(f): {"contexts": [context(text)], "partner": partner if f % 2 else None} for f in features}


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_the_page_holds_the_table():
    features = table(50)
    data = data_of(feature_page(results(features), features, contexts([3])))
    assert list(data["columns"]) == list(COLUMNS)
    for name in COLUMNS:
        wanted = [None if pd.isna(v) else v for v in features[name].tolist()]
        if name == "statement":
            wanted = [list(rules.STATEMENTS).index(v) for v in wanted]
        for value, found in zip(wanted, data["columns"][name], strict=True):
            assert found == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name
    assert data["contexts"]["3"]["contexts"][0]["values"][-1] == 2.5
    assert data["contexts"]["3"]["partner"]["feature"] == 7


def test_what_may_not_be_certified_is_said():
    features = table(20)
    limits = ["Relatives are no fresh trainings, therefore nothing is certified."]
    html = feature_page(results(features, "relative", certified=None, limits=limits), features, {})
    assert limits[0] in html
    assert "14 relatives" in html
    assert data_of(html)["peers"] == "relatives"
    assert feature_page(results(features), features, {}) == feature_page(results(features), features, {})


def test_tile_and_summary_count_prototype_like_features_apart():
    features = table(20)
    bars = {"cosine": 0.7, "correlation": 0.5, "certified_at": 0.5}
    found = FeatureReliability.model_validate(results(features, bars=bars))
    (tile,) = [t for t in tiles(found) if t.name == "Above chance"]
    assert tile.value == "0"
    assert "of 236" in tile.spread
    assert "18 of 20" in tile.note
    (line,) = [line for line in summary_lines(found.to_json()) if "Above chance" in line]
    assert "0 of 236" in line
    assert "18 of 20" in line


FIGURES = st.floats(-1e300, 1e300) | st.just(float("nan"))


@given(st.lists(st.none() | st.booleans() | st.integers() | FIGURES | st.text(max_size=20), max_size=10))
def test_values_survive(values):
    again = json.loads(embedded(encoded(values)))
    for value, found in zip(values, again, strict=True):
        if value is None or value != value:
            assert found is None
        else:
            assert found == (value if isinstance(value, str | int) else pytest.approx(value, rel=1e-3))
    assert "<" not in embedded(values if all(v == v for v in values) else [])


def test_contexts_are_left_out_where_there_is_no_room():
    found = contexts(range(100))
    kept, left_out = within(found, 5000)
    assert 0 < len(kept) < 100
    assert len(kept) + left_out == 100
    assert len(embedded(kept)) <= 5000
    features = table(100)
    assert "contexts.json" not in feature_page(results(features), features, found)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize(
    "n", [pytest.param(2000, marks=pytest.mark.slow), pytest.param(16_384, marks=pytest.mark.nightly)]
)
def test_many_features_in_a_browser(n, tmp_path):
    """No message on the console, few rows are drawn, and each action takes less than a second."""
    features = table(n)
    features.loc[10, "prototype"] = HOSTILE
    html = feature_page(results(features), features, contexts(range(0, n, 8), HOSTILE))
    assert len(html.encode()) < 15e6
    dom, console = browse(html, tmp_path)
    assert console == []
    assert f">{n:,} of {n:,}</output>" in dom
    assert 5 < len(re.findall("data-at=", dom)) < 100, "those in sight alone"
    script = """
const times = {}, said = {};
const timed = (name, act) => { const t = performance.now(); act(); times[name] = performance.now() - t; };
const put = (id, value, kind = "input") => {
  $(id).value = value; $(id).dispatchEvent(new Event(kind, { bubbles: true }));
};
for (const name of ["similarity", "prototype"]) timed(`sort ${name}`, () => put("sort", name, "change"));
const ends = () => [columns.prototype[order[0]] === null, columns.prototype[order.at(-1)] === null];
said.nulls = [ends(), ($("turn").click(), ends())];
timed("search", () => put("search", "partner"));
put("search", "1024"); said.number = $("count").textContent;
timed("open", () => body.querySelector("tr[data-at]").click());
said.title = $("feature-title").textContent; said.contexts = $("contexts").textContent; dialog.close();
put("search", "");
put("least", "14"); said.least = $("count").textContent; put("least", "0");
const boxes = [...document.querySelectorAll("[name=statement]")];
boxes.forEach((box) => { box.checked = box.dataset.name === "dead"; });
boxes[0].dispatchEvent(new Event("input", { bubbles: true })); said.dead = $("count").textContent; $("all").click();
$("with").click(); said.with = $("count").textContent; $("with").click();
sortBy("feature", false); timed("far", () => { scrollTo(0, 36 * 1200); draw(); });
said.far = body.querySelector("tr[data-at] .open").textContent; said.rows = body.rows.length;
body.querySelector("tr[data-at] .open").focus();
document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "End", bubbles: true }));
said.end = document.activeElement.textContent;
said.wide = document.documentElement.scrollWidth <= innerWidth;
const out = document.createElement("pre"); out.id = "said";
out.textContent = JSON.stringify({ times, said }); document.body.append(out);
"""
    dom, console = browse(with_script(html, script), tmp_path)
    assert console == []
    found = json.loads(Text(dom).inside["said"])
    said = found["said"]
    count = {name: f"{int(k):,} of {n:,}" for name, k in features["statement"].value_counts().items()}
    assert said["dead"] == count["dead"]
    assert said["least"] == f"{int((features['recurs'] == 14).sum()):,} of {n:,}"
    assert said["number"] == f"1 of {n:,}"
    assert said["with"] == f"{n // 8:,} of {n:,}"
    assert said["title"].startswith("Feature 1024 ")
    assert HOSTILE in said["contexts"], "text stays text"
    assert said["nulls"] == [[False, True]] * 2, "features without a value are last, in both orders"
    assert 1_150 < int(said["far"]) < 1_200
    assert said["rows"] < 100
    assert said["end"] == str(n - 1)
    assert said["wide"]
    assert max(found["times"].values()) < 1000, found["times"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_on_a_phone(tmp_path):
    features = table(300)
    html = feature_page(results(features), features, contexts(range(300)))
    measure = "document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`"
    dom, console = browse(with_script(html, measure), tmp_path, 390)
    wide, of = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())
    assert (console, wide <= of) == ([], True)


class Text(HTMLParser):
    """Text of elements by their id."""

    def __init__(self, html: str):
        super().__init__()
        self.inside, self.id = {}, None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.id = dict(attrs).get("id")

    def handle_endtag(self, tag):
        self.id = None

    def handle_data(self, data):
        if self.id:
            self.inside[self.id] = self.inside.get(self.id, "") + data
