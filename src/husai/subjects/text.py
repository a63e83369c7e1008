"""Real, labelled text that the installed sae-probes package carries, split once, by name, into three sides.

`train` is what husai-tiny learns from, `probe` what probes are trained and scored on, `ood` what stands for a shift of
the data. A family is a group of data sets made from the same source texts, and lies on one side as a whole. The table
is fixed: subjects, probes and stress tests all read it here. The text itself is read from the package, never copied.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from husai.runs.errors import BadInput
from husai.runs.files import digest

FAMILIES: dict[str, dict[str, list[str]]] = {
    "train": {
        "essays": ["94_ai_gen"],
        "cosmos_qa": [
            "45_context_ans",
            "46_context_type",
            "133_context_type_Causality",
            "134_context_type_Belief_states",
            "135_context_type_Event_duration",
        ],
        "political_news": ["100_news_fake"],
        "moral_stories": ["48_cm_correct", "49_cm_isshort"],
        "yelp": ["111_yelp_data", "112_amzn_rev"],  # the second is a copy of the first
        "cancer_papers": [
            "98_cancer_cat",
            "142_cancer_cat_Thyroid_Cancer",
            "143_cancer_cat_Lung_Cancer",
            "144_cancer_cat_Colon_Cancer",
        ],
        "social_iqa": ["86_social_iqa"],
    },
    "probe": {
        "historical_figures": [
            "2_hist_fig_birthyear",
            "3_hist_fig_deathyear",
            "4_hist_fig_age",
            "5_hist_fig_ismale",
            "6_hist_fig_isamerican",
            "7_hist_fig_ispolitician",
        ],
        "new_york": [
            "8_nyc_lat",
            "9_nyc_long",
            "10_nyc_borough",
            "114_nyc_borough_Manhattan",
            "115_nyc_borough_Brooklyn",
            "116_nyc_borough_Bronx",
        ],
        "places": [
            "11_us_lat",
            "12_us_long",
            "13_us_state",
            "14_us_timezone",
            "15_us_population",
            "16_us_density",
            "17_world_country",
            "18_world_latitude",
            "19_world_longitude",
            "20_world_pageviews",
            "117_us_state_FL",
            "118_us_state_CA",
            "119_us_state_TX",
            "120_us_timezone_Chicago",
            "121_us_timezone_New_York",
            "122_us_timezone_Los_Angeles",
            "123_world_country_United_Kingdom",
            "124_world_country_United_States",
            "125_world_country_Italy",
        ],
        "headlines": [
            "21_headline_istrump",
            "22_headline_isobama",
            "23_headline_ischina",
            "24_headline_isiran",
            "25_headline_year",
            "26_headline_isfrontpage",
        ],
        "titles": [
            "27_art_type",
            "28_art_year",
            "29_art_pageviews",
            "30_book_length",
            "126_art_type_book",
            "127_art_type_song",
            "128_art_type_movie",
        ],
        "sciq": ["36_sciq_tf"],
        "arithmetic": ["37_arith_mc", "38_arith_difficulty", "39_arith_infix", "40_arith_rpn", "129_arith_mc_A"],
        "truthful_qa": ["41_truthqa_tf"],
        "temporal": [
            "42_temp_sense",
            "43_temp_cat",
            "130_temp_cat_Frequency",
            "131_temp_cat_Typical Time",
            "132_temp_cat_Event Ordering",
        ],
        "piqa": ["44_phys_tf"],
        "qualitative_reasoning": ["47_reasoning_tf"],
        "deontology": ["50_deon_isvalid"],
        "justice": ["51_just_is"],
        "virtue": ["52_virtue_is"],
        "commonsense_qa": ["54_cs_tf"],
        "open_book_qa": ["55_open_qa"],
        "wikidata": [
            "56_wikidatasex_or_gender",
            "57_wikidatais_alive",
            "58_wikidatapolitical_party",
            "59_wikidata_occupation_isjournalist",
            "60_wikidata_occupation_isathlete",
            "61_wikidata_occupation_isactor",
            "62_wikidata_occupation_ispolitician",
            "63_wikidata_occupation_issinger",
            "64_wikidata_occupation_isresearcher",
        ],
        "phrases": [
            "65_high-school",
            "66_living-room",
            "67_social-security",
            "68_credit-card",
            "69_blood-pressure",
            "70_prime-factors",
            "71_social-media",
            "72_gene-expression",
            "73_control-group",
            "74_magnetic-field",
            "75_cell-lines",
            "76_trial-court",
            "77_second-derivative",
            "78_north-america",
            "79_human-rights",
            "80_side-effects",
            "81_public-health",
            "82_federal-government",
            "83_third-party",
            "84_clinical-trials",
            "85_mental-health",
        ],
        "cola": ["87_glue_cola"],
        "mnli": [
            "88_glue_mnli",
            "136_glue_mnli_entailment",
            "137_glue_mnli_neutral",
            "138_glue_mnli_contradiction",
        ],
        "paraphrases": ["89_glue_mrpc", "93_glue_stsb"],
        "qnli": ["90_glue_qnli"],
        "qqp": ["91_glue_qqp"],
        "film_reviews": ["92_glue_sst2", "113_movie_sent"],
        "toxic_chat": ["95_toxic_is"],
        "sms": ["96_spam_is"],
        "science_posts": ["99_sci_cat"],
        "medical_abstracts": [
            "101_disease_class",
            "145_disease_class_digestive system diseases",
            "146_disease_class_cardiovascular diseases",
            "147_disease_class_nervous system diseases",
        ],
        "tweets": [
            "102_twt_emotion",
            "148_twt_emotion_worry",
            "149_twt_emotion_happiness",
            "150_twt_emotion_sadness",
        ],
        "it_tickets": [
            "103_it_tick",
            "151_it_tick_HR Support",
            "152_it_tick_Hardware",
            "153_it_tick_Administrative rights",
        ],
        "clickbait": ["105_click_bait"],
        "hate_speech": ["106_hate_hate", "107_hate_offensive"],
        "athletes": [
            "108_athlete_sport",
            "109_ball_ws",
            "154_athlete_sport_football",
            "155_athlete_sport_basketball",
            "156_athlete_sport_baseball",
        ],
        "human_or_gpt3": ["110_aimade_humangpt3"],
        "amazon": ["157_amazon_5star"],
    },
    "ood": {
        "code_and_ag_news": [  # the topics' counter-examples are code, and 97 draws on the same news
            "97_news_class",
            "139_news_class_Politics",
            "140_news_class_Technology",
            "141_news_class_Entertainment",
            "158_code_C",
            "159_code_Python",
            "160_code_HTML",
            "161_agnews_0",
            "162_agnews_1",
            "163_agnews_2",
        ],
        "shifted": [  # probe sets of the same number, in another language, spelling or register
            "5_hist_fig_ismale_OOD",
            "6_hist_fig_isamerican_OOD",
            "7_hist_fig_ispolitician_OOD",
            "66_living-room_OOD",
            "67_social-security_OOD",
            "73_control-group_OOD",
            "87_glue_cola_OOD",
            "90_glue_qnli_OOD",
        ],
    },
}

SIDES_APART = {"0.4.2"}
"""Versions of sae-probes in which no training document occurs on another side, which takes seconds to find out."""
OPENING = 100  # characters: documents that begin alike share a passage, and are held out together
HELD_OUT_EVERY = 50


def names(side: str) -> list[str]:
    """The data sets of a side, in the table's order."""
    return [name for family in FAMILIES[side].values() for name in family]


def expand(chosen: list[str]) -> list[str]:
    """Names of data sets, where `train`, `probe` and `ood` stand for a whole side.

    Raises:
        BadInput: a name that is neither a side nor a data set.
    """
    known = {name for side in FAMILIES for name in names(side)}
    for name in chosen:
        if name not in FAMILIES and name not in known:
            raise BadInput(f"data set {name!r}: train, probe, ood or a name of the sae-probes package expected")
    return [name for part in chosen for name in (names(part) if part in FAMILIES else [part])]


def distinct(chosen: list[str]) -> list[str]:
    """The documents of the chosen data sets (or sides), each once, ordered by hash."""
    found = {document_id(text): text for name in expand(chosen) for text in documents(name)}
    return [found[key] for key in sorted(found)]


def data_folder() -> Path:
    """Where the installed sae-probes package keeps its data; found without importing it.

    Raises:
        BadInput: the package is not installed.
    """
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput("the sae-probes package, whose texts are read, is not installed: make setup")
    return Path(spec.submodule_search_locations[0]) / "data"


def path_of(name: str) -> Path:
    """The file of a data set."""
    return data_folder() / ("OOD data" if name.endswith("_OOD") else "cleaned_data") / f"{name}.csv.zst"


def table(name: str):
    """A data set as pandas reads it: columns `prompt` and `target`, a row a document."""
    import pandas as pd

    path = path_of(name)
    if not path.is_file():
        raise BadInput(f"data set {name!r}: the installed sae-probes package has no {path.name}")
    return pd.read_csv(path, compression="zstd")


def documents(name: str) -> list[str]:
    """The texts of a data set, in its order, repeats included."""
    return [str(text) for text in table(name)["prompt"]]


def document_id(text: str) -> str:
    """sha256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def binary_sets() -> list[str]:
    """The data sets with two classes: those of the sae-probes benchmark."""
    import pandas as pd

    master = pd.read_csv(data_folder() / "probing_datasets_MASTER.csv.zst", compression="zstd")
    saved = master[master["Data type"] == "Binary Classification"]["Dataset save name"]
    return [name.split("/")[-1].removesuffix(".csv") for name in saved]


def probe_sets() -> list[str]:
    """The benchmark's data sets on the probe side."""
    binary = set(binary_sets())
    return [name for name in names("probe") if name in binary]


@dataclass(frozen=True)
class Corpus:
    """What a language model is trained on, and the documents held out of it. Each document once, ordered by hash."""

    train: list[str]
    heldout: list[str]
    heldout_families: list[str]
    """Of each held-out document."""
    dropped: int
    """Training documents that a probe or out-of-distribution set also holds; left out."""

    @property
    def digest(self) -> str:
        return digest({"train": [*map(document_id, self.train)], "heldout": [*map(document_id, self.heldout)]})


def documents_elsewhere() -> set[str]:
    """Ids of all documents of the probe and out-of-distribution sides."""
    return {document_id(text) for side in ("probe", "ood") for name in names(side) for text in documents(name)}


@cache
def corpus() -> Corpus:
    """The training side without whatever occurs on another side; one opening in 50 is held out.

    Kept, because it takes seconds to read and hash, and a study asks for it many times.
    """
    data_folder()  # says what to do without the package
    known = importlib.metadata.version("sae-probes") in SIDES_APART
    elsewhere = set() if known else documents_elsewhere()
    found = {}
    for family, members in FAMILIES["train"].items():
        for name in members:
            found |= {document_id(text): (text, family) for text in documents(name)}
    kept = [found[key] for key in sorted(found) if key not in elsewhere]
    held = [int(document_id(text[:OPENING])[:8], 16) % HELD_OUT_EVERY == 0 for text, _ in kept]
    return Corpus(
        train=[text for (text, _), out in zip(kept, held, strict=True) if not out],
        heldout=[text for (text, _), out in zip(kept, held, strict=True) if out],
        heldout_families=[family for (_, family), out in zip(kept, held, strict=True) if out],
        dropped=len(found) - len(kept),
    )
