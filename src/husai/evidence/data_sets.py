"""The labelled data sets that the sae-probes package carries, split once, by name, into three sides.

`train` holds the training text of husai-tiny, `probe` the data sets for probes, `ood` the shifted data. A family is a
group of data sets made from the same source texts. Each family belongs to one side as a whole. The table is fixed:
subjects, probes, stress tests and the gate read it here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

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

DATA_SETS = (
    "5_hist_fig_ismale,21_headline_istrump,36_sciq_tf,41_truthqa_tf,44_phys_tf,50_deon_isvalid,52_virtue_is,54_cs_tf,"
    "56_wikidatasex_or_gender,65_high-school,87_glue_cola,89_glue_mrpc,90_glue_qnli,91_glue_qqp,92_glue_sst2,"
    "95_toxic_is,96_spam_is,105_click_bait,106_hate_hate,110_aimade_humangpt3,113_movie_sent,114_nyc_borough_Manhattan,"
    "127_art_type_song,157_amazon_5star"
)
"""24 probing data sets from many families, for studies that must finish in minutes."""
PAIR_SETS = (
    "36_sciq_tf,92_glue_sst2,95_toxic_is,96_spam_is,105_click_bait,106_hate_hate,110_aimade_humangpt3,157_amazon_5star"
)
"""Data sets of contrastive pairs, if CE-Bench's stories are not available."""


def families(data_sets: list[str]) -> list[str]:
    """Family of each data set. Data sets of one family were made from the same texts.

    Raises:
        BadInput: a data set is unknown.
    """
    family_of_set = {name: family for side in FAMILIES.values() for family, members in side.items() for name in members}
    if unknown := [name for name in data_sets if name not in family_of_set]:
        raise BadInput(f"data set {unknown[0]!r}: a name of the sae-probes package expected")
    return [family_of_set[name] for name in data_sets]


ONE_IN = 3
"""Selection reads one in this many groups."""
FEWEST = 3
"""Fewest groups that selection reads."""
LARGEST = 4
"""Largest share of one group in the gated sets, as 1/LARGEST."""


def third(groups: Iterable[str], read: Collection[str] = (), left: Collection[str] = ()) -> list[str]:
    """Groups that selection reads: a third, at least three, the first in the order of their names' digests.

    Args:
        read: groups that selection reads in any case; they count first. left: groups that the gate reads in any case.
    """
    distinct = set(groups)
    free = sorted(distinct - {*read, *left}, key=digest)
    first = sorted(distinct & {*read})
    most = max(FEWEST, -(-len(distinct) // ONE_IN))
    return sorted(first + free[: max(0, most - len(first))])


def gated(names: Sequence[str], groups: Sequence[str]) -> list[int]:
    """Places of the sets that the gate counts, in order.

    With four groups or more, no group holds more than a quarter of these sets. With fewer, all groups hold equally
    many. Up to c sets of each group count, the first in the order of their names' digests. c is the largest number that
    keeps every group small enough.
    """
    members: dict[str, list[int]] = {}
    for place in sorted(range(len(names)), key=lambda i: digest(names[i])):
        members.setdefault(groups[place], []).append(place)
    if not members:
        return []
    sizes, parts = [*map(len, members.values())], min(LARGEST, len(members))
    most = max(c for c in range(1, max(sizes) + 1) if parts * c <= sum(min(n, c) for n in sizes))
    return sorted(place for places in members.values() for place in places[:most])


def pair_names(clusters: Sequence[str]) -> list[str]:
    """Name of each pair of stories: its cluster, and its number within the cluster."""
    counts: dict[str, int] = {}
    names = []
    for cluster in clusters:
        counts[cluster] = counts.get(cluster, 0) + 1
        names.append(f"{cluster}, pair {counts[cluster]}")
    return names
