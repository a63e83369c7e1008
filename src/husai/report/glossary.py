"""Glossary: one line on each technical term of a page, shown on hover and listed at the end of the page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Term:
    name: str
    meaning: str
    words: tuple[str, ...]
    """Further spellings in the text."""

    @property
    def anchor(self) -> str:
        return "term-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def _terms(*entries: tuple[str, str] | tuple[str, str, tuple[str, ...]]) -> dict[str, Term]:
    return {name: Term(name, meaning, tuple(*more)) for name, meaning, *more in entries}


TERMS = _terms(
    (
        "SAE",
        "Sparse autoencoder: a dictionary of directions, few of which add up to each activation.",
        ("SAEs",),
    ),
    (
        "feature",
        "One direction of an SAE's decoder, and the rule by which it becomes active.",
        ("features",),
    ),
    (
        "subject",
        "The model whose activations the SAE reads.",
    ),
    (
        "hook",
        "The place in the model at which activations are read.",
    ),
    (
        "seed",
        "Random number that starts a training: it fixes the initial weights and the order of the data.",
        ("seeds",),
    ),
    (
        "held-out",
        "Set aside: neither the SAE nor the model was trained on it.",
    ),
    (
        "explained variance",
        "Share of the spread of held-out activations that the SAE's reconstruction keeps. 1 "
        "is perfect, 0 is no better than the mean.",
    ),
    (
        "CE recovered",
        "Share of the model's loss that is kept when the reconstruction replaces the "
        "activation. 1 is no loss, 0 is as bad as zeros.",
        (
            "CE loss score",
            "cross-entropy",
        ),
    ),
    (
        "dead features",
        "Features that fire on no held-out token.",
        (
            "dead feature",
            "dead",
        ),
    ),
    (
        "alive",
        "Fires on at least one held-out token.",
    ),
    (
        "L0",
        "Mean number of features that are active on a token.",
    ),
    (
        "stable share",
        "Share of the alive features that have a partner with a cosine of at least 0.7 in an SAE of another seed.",
        (
            "share70_alive",
            "share70",
            "single features",
        ),
    ),
    (
        "mcc",
        "Mean cosine of the features of two SAEs, each feature with its one-to-one partner; negative cosines count 0.",
        (
            "mcc_alive",
            "mcc_others",
        ),
    ),
    (
        "pwmcc",
        "Mean of the largest absolute cosine of each feature with any feature of the other SAE.",
        ("pwmcc_alive",),
    ),
    (
        "excess",
        "Score of trained SAEs less that of a control of the same shape.",
    ),
    (
        "control",
        "Dictionaries of the same shape that have learned no features. A score counts only above theirs.",
        (
            "controls",
            "null",
            "nulls",
        ),
    ),
    (
        "isotropic",
        "Control: random directions.",
    ),
    (
        "spectral",
        "Control: random dictionaries with the same strength in each principal component of the activations.",
    ),
    (
        "Gaussian rows",
        "Control: SAEs trained alike on random numbers with the activations' mean and covariance.",
        ("gaussian",),
    ),
    (
        "untrained",
        "Control: the same SAE before training.",
    ),
    (
        "random weights",
        "Control: SAEs trained alike on the same model with random weights.",
        ("random-weights",),
    ),
    (
        "prototypes",
        "Means of tokens, centroids and single rows: directions that any method finds, without learning features.",
        (
            "prototype",
            "token means",
            "centroids",
        ),
    ),
    (
        "transcoder",
        "An SAE that predicts what a layer writes from what it reads.",
        (
            "transcoders",
            "Transcoders",
        ),
    ),
    (
        "probe",
        "A classifier that reads a label from activations, or from a few features.",
        (
            "probes",
            "Probes",
            "probing",
        ),
    ),
    (
        "AUC",
        "Quality of a classifier: 0.5 is guessing, 1 is perfect.",
    ),
    (
        "PCA",
        "Principal components of the activations: directions of most spread, found without training.",
        ("principal components",),
    ),
    (
        "SAEBench",
        "Benchmark: how well probes on few features of an SAE predict labels.",
    ),
    (
        "CE-Bench",
        "Benchmark: how sharply single features separate pairs of contrasting stories.",
    ),
    (
        "matched reference",
        "SAEs of another architecture with the same width, L0 and training data, to compare with.",
        ("reference",),
    ),
    (
        "interval",
        "Range that contains the true figure in the stated share of studies. n is the number of SAEs.",
    ),
    (
        "provisional",
        "No pass: something was waived, loosened, or cannot be seen.",
    ),
    (
        "positive control",
        "Check of the method: SAEs of planted, known features, which must be found. It says nothing about your SAEs.",
    ),
    (
        "planted features",
        "Features that a generator put into synthetic data, and therefore known.",
    ),
    (
        "shifted data",
        "Text of another language, spelling or register than the training text.",
        (
            "shifted data sets",
            "shifted text",
            "under shift",
        ),
    ),
    (
        "TopK",
        "Architecture that keeps the k most active features of each token.",
        ("topk",),
    ),
    (
        "ReLU",
        "Architecture that keeps each feature above zero, and is trained to keep few.",
        ("relu",),
    ),
    (
        "effective rank",
        "Number of directions in which the activations spread noticeably.",
    ),
    (
        "checkpoint",
        "The saved weights of one training.",
        ("checkpoints",),
    ),
)
"""Name -> term, in the order of the glossary."""
SPELLINGS = {
    spelling: term
    for term in TERMS.values()
    for word in (term.name, *term.words)
    for spelling in (word, word[0].upper() + word[1:])
}
"""A term as the text writes it, at the beginning of a sentence too."""
_LONGEST_FIRST = sorted(SPELLINGS, key=len, reverse=True)
FOUND = re.compile(rf"(?<![\w/.-])({'|'.join(map(re.escape, _LONGEST_FIRST))})(?![\w/-])")
OPAQUE = {
    *("a", "button", "figcaption", "h1", "h2", "head", "header", "mark"),
    *("nav", "option", "pre", "script", "style", "summary"),
}
"""Elements in which no term is marked."""
RESTART = {"section", "article"}
"""Elements in which the first use of each term is marked again."""


def explain(page: str) -> str:
    """A page in which the first use of each term in each section leads to its line of the glossary.

    A reader sees the meaning on hover, and by keyboard or touch in the glossary. Text stays as it is.
    """
    pieces = re.split(r"(<[^<>]*>)", page)
    opaque: list[str] = []
    seen: set[str] = set()
    for i, piece in enumerate(pieces):
        if i % 2:
            name = re.match(r"</?([a-zA-Z0-9]+)", piece)
            tag = name[1].lower() if name else ""
            if tag in RESTART:
                seen = set()
            if tag in OPAQUE:
                opaque = [*opaque, tag] if not piece.startswith("</") else opaque[:-1]
            if 'class="glossary"' in piece:
                break
        elif piece.strip() and not opaque:
            pieces[i] = FOUND.sub(partial(_linked, seen), piece)
    return "".join(pieces)


def _linked(seen: set[str], match: re.Match) -> str:
    word = match[1]
    term = SPELLINGS[word]
    if term.name in seen:
        return word
    seen.add(term.name)
    return f'<a class="term" href="#{term.anchor}" title="{term.meaning}">{word}</a>'
