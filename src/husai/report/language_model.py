"""Draws figures of a language model: loss, bits per byte with those of n-grams, and probes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from husai.evidence.schemas import CrossEntropy, Phase4aSection
from husai.report.figures import COLOURS, _save

MODELS = {"model": "#0b6e99", "trigram": "#d9730d", "bigram": "#b59b00", "unigram": "#9a9a9a"}


def loss(history: list[dict], path: Path) -> Path:
    """Loss in training and on held-out windows against tokens seen."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    tokens = [row["tokens"] / 1e6 for row in history]
    axis.plot(tokens, [row["train_loss"] for row in history], color="#9a9a9a", lw=1.4, label="training")
    axis.plot(tokens, [row["heldout_loss"] for row in history], color=COLOURS["observed"], lw=2, label="held out")
    axis.set(xlabel="tokens seen (millions)", ylabel="nats a token")
    axis.set_title("Loss of the language model", loc="left")
    axis.legend(frameon=False)
    return _save(figure, path)


def bits_per_byte(figures: dict, path: Path) -> Path:
    """Bits per byte of the model and of n-grams, on all held-out documents and on those of each family."""
    groups = {"all": figures["all"], **figures["families"]}
    figure, axis = plt.subplots(figsize=(9, 4.2))
    width = 0.2
    for i, (name, colour) in enumerate(MODELS.items()):
        x = np.arange(len(groups)) + (i - 1.5) * width
        axis.bar(x, [row[name] for row in groups.values()], width, color=colour, label=name)
    axis.set_xticks(range(len(groups)), [g.replace("_", "\n") for g in groups])
    axis.set(ylabel="bits per byte")
    axis.set_title("Held-out documents: the model beside Witten–Bell n-grams of its tokens", loc="left")
    axis.legend(frameon=False, ncols=4)
    return _save(figure, path)


def probes(results: dict, path: Path) -> Path:
    """AUC on each data set at the first hook, with its interval, and that of the random-weights model."""
    hook = next(iter(results["probes"]))
    aucs = [record["auc"] for record in results["probes"][hook]]
    order = np.argsort([a["estimate"] for a in aucs])
    estimate, low, high = (np.array([aucs[i][name] for i in order]) for name in ("estimate", "low", "high"))
    figure, axis = plt.subplots(figsize=(9, 4.6))
    x = np.arange(len(order))
    errors = np.clip([estimate - low, high - estimate], 0, None)
    axis.errorbar(x, estimate, errors, fmt="o", ms=3.5, lw=1, color=COLOURS["observed"], label=results["subject"])
    if results["control"]:
        control = [results["control"][hook][i]["auc"]["estimate"] for i in order]
        axis.plot(x, control, "x", ms=4, color=COLOURS["spectral"], label="the same, weights redrawn at random")
    axis.axhline(0.5, color="#5f5f5f", lw=1, ls="--")
    axis.set(xlabel="data sets, by AUC", ylabel="test AUC", ylim=(0.35, 1.01), xticks=[])
    axis.set_title(f"Logistic probes on {hook}, 95 % intervals; chance is 0.5", loc="left")
    axis.legend(frameon=False, loc="upper left")
    return _save(figure, path)


def cross_entropy(section: Phase4aSection, losses: CrossEntropy, path: Path) -> Path:
    """Loss with each seed's SAE spliced in, with the model's own loss and the loss with zeroed activations."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    labels = [m.label for m in section.members]
    bars = axis.bar(labels, losses.spliced, color=COLOURS["observed"], alpha=0.8)
    axis.bar_label(bars, [f"{share:.1%} recovered" for share in losses.recovered], fontsize=8)
    axis.axhline(losses.model, color="#5f5f5f", lw=1.4, label="the model as it is")
    axis.axhline(losses.zeroed, color=COLOURS["spectral"], lw=1.4, ls="--", label="zeros in the activation's place")
    axis.set(ylabel="nats a token")
    axis.set_title(f"Cross-entropy with an SAE spliced in at {section.hook_name}", loc="left")
    axis.legend(frameon=False)
    return _save(figure, path)
