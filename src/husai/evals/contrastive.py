"""CE-Bench (Peng et al., "CE-Bench: Towards a reliable contrastive evaluation benchmark of interpretability of sparse
autoencoders", 2025): how well an SAE's features separate two stories on one subject.

V is the vector of mean feature activations over the tokens of a story. The score uses the contrast |V₁ − V₂|, the
independence |I − Ī| (I: mean over the tokens of both stories; Ī: mean of I over the data set), and their sum. Each is
z-scored over features. The score of a pair is the largest z; the score of an SAE is the mean over pairs. There are two
variants: `published`, whose code leaves Ī at zero, and `corrected`.

The largest z of n numbers is at most (n − 1)/√n. Therefore scores grow with the number of features, even with dead
ones. Scores are compared at one width only; `normalised` divides by the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from husai.activations.language_model import batches, run
from husai.dictionaries.sae import SAE
from husai.evidence import data_sets
from husai.evidence.levels import within_reach
from husai.evidence.schemas import ContrastiveName
from husai.runs.errors import BadInput
from husai.runs.files import digest
from husai.runs.progress import progress
from husai.runs.seeds import generator
from husai.subjects import text
from husai.subjects.pretrained import LanguageModel

COLUMNS = ("story1", "story2", "subject")
PUBLISHED = "GulkoA/contrastive-stories-v"
"""Start of the names of the published data sets."""
SCORES = ("contrastive", "independence", "interpretability")
AT_ONCE = 2**26  # features held at a time, tokens x d_sae


@dataclass(frozen=True)
class Pairs:
    """Story pairs."""

    benchmark: ContrastiveName
    """`cebench`: pairs from CE-Bench's repository on the hub. `cebench_local_copy`: a local file that the user names a
    copy, which is not verified. `contrastive_local`: local pairs, another metric. Gates accept only the first."""
    source: str
    rows: list[dict[str, str]]
    """Story pairs, each with the keys COLUMNS."""

    @property
    def digest(self) -> str:
        return digest([self.benchmark, self.rows])

    @property
    def clusters(self) -> list[str]:
        """Cluster of each pair: its subject, or for local pairs the family of its data set."""
        subjects = [row["subject"] for row in self.rows]
        return data_sets.families(subjects) if self.benchmark == "contrastive_local" else subjects


def local_pairs(data_sets: list[str], rows: int, seed: int) -> Pairs:
    """Pairs of texts from the two classes of labelled data sets, drawn without replacement.

    Raises:
        BadInput: the data sets hold fewer pairs than `rows`.
    """
    pairs: list[dict[str, str]] = []
    for i, name in enumerate(data_sets):
        size = (rows + len(data_sets) - 1 - i) // len(data_sets)
        table = text.table(name)
        classes = sorted(table["target"].unique(), key=str)
        sides = []
        for label in classes[:2]:
            texts = table["prompt"][table["target"] == label].astype(str).tolist()
            order = torch.randperm(len(texts), generator=generator(seed, "pairs", name, str(label))).tolist()
            sides.append([texts[j] for j in order[:size]])
        if min(map(len, sides)) < size:
            raise BadInput(f"--max-rows {rows}: {name} holds {min(map(len, sides))} pairs; {size} needed of it")
        pairs += [dict(zip(COLUMNS, (a, b, name), strict=True)) for a, b in zip(*sides, strict=True)]
    return Pairs("contrastive_local", f"sae-probes, two classes of {len(data_sets)} data sets", pairs)


def drawn(stories: str | None, data_sets: list[str], rows: int, seed: int) -> Pairs:
    """Published stories if `stories` names some, else local pairs from the data sets, which were checked before."""
    return published_pairs(stories, rows, seed) if stories else local_pairs(data_sets, rows, seed)


def refuse_unknown(stories: str | None) -> None:
    """Raise BadInput for stories that are neither a path on this machine nor CE-Bench's data set on the hub."""
    if stories is not None and not Path(stories).exists() and not stories.startswith(PUBLISHED):
        raise BadInput(f"--stories {stories}: neither a path nor a data set {PUBLISHED}*")


def published_pairs(name: str, rows: int | None, seed: int) -> Pairs:
    """CE-Bench's stories, from the hub (cached or downloaded) or from a local copy of the data set.

    Args:
        rows: size of a random sample; None for all pairs.

    Raises:
        BadInput: the data set cannot be read, lacks a column, or is empty.
    """
    import datasets

    refuse_unknown(name)
    datasets.disable_progress_bars()
    path = Path(name)
    try:
        if path.is_dir() and (path / "dataset_info.json").is_file():
            table = datasets.load_from_disk(str(path))
        elif path.exists():
            kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
            files = sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.suffix in kind)
            if not files:
                raise BadInput(f"--stories: {path} holds no .jsonl, .json, .csv or .parquet file")
            table = datasets.load_dataset(kind[files[0].suffix], data_files=[str(p) for p in files], split="train")
        else:
            table = datasets.load_dataset(name, split="train")
    except BadInput:
        raise
    except Exception as error:  # the hub's client and readers raise many types of exceptions
        raise BadInput(
            f"--stories {name}: cannot be read ({type(error).__name__}); without it, pairs are built locally"
        ) from None
    missing = [c for c in COLUMNS if c not in table.column_names]
    if missing:
        raise BadInput(f"--stories {name}: column {missing[0]} is missing; {', '.join(COLUMNS)} expected")
    if len(table) == 0:
        raise BadInput(f"--stories {name}: no row")
    chosen: Sequence[int] = range(len(table))
    if rows is not None and rows < len(table):
        chosen = sorted(torch.randperm(len(table), generator=generator(seed, "stories"))[:rows].tolist())
    pairs = [{c: str(table[i][c]) for c in COLUMNS} for i in chosen]
    local = path.exists()
    return Pairs("cebench_local_copy" if local else "cebench", f"a local copy, {path.name}" if local else name, pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Mean features of each story


@torch.inference_mode()
def story_means(
    subject: LanguageModel, hook_name: str, saes: list[SAE], stories: list[str], folder: Path
) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Mean feature activations of each story over its tokens. All SAEs share one pass of the model.

    Stories of similar length form a batch, padded on the right. Each story is cut to n_ctx tokens.

    Args:
        folder: holds the means, because they do not fit into memory for wide SAEs and many stories.

    Returns:
        (a memory-mapped `[stories, d_sae]` for each SAE; number of tokens in each story's mean, `[stories]`; number of
        stories that were cut)
    """
    whole = subject.harvesting.encode(subject.tokenizer, stories, None)
    if [] in whole:
        raise BadInput(f"story {whole.index([]) % (len(stories) // 2 or 1)}: no token; a text expected")
    inputs = [np.array(ids[: subject.n_ctx]) for ids in whole]
    kept = [subject.harvesting.kept(tokens, first=0) for tokens in inputs]
    if none := [i for i, k in enumerate(kept) if not k.any()]:
        story = none[0] % (len(stories) // 2 or 1)
        raise BadInput(f"story {story}: no token at a position that gives rows; longer stories expected")
    lengths, rows = np.array([*map(len, inputs)]), np.array([int(k.sum()) for k in kept])
    device = next(subject.model.parameters()).device
    saes = [sae.to(device) for sae in saes]
    folder.mkdir(parents=True, exist_ok=True)
    means = [
        np.lib.format.open_memmap(folder / f"{i}.npy", "w+", np.float32, (len(stories), sae.d_sae))
        for i, sae in enumerate(saes)
    ]
    with progress("reading stories", len(stories)) as advance:
        for chosen in batches(lengths):
            x = run(subject, [inputs[i] for i in chosen], [hook_name])[hook_name]
            mask = nn.utils.rnn.pad_sequence([torch.from_numpy(kept[i]) for i in chosen], batch_first=True)
            row, position = torch.nonzero(mask, as_tuple=True)
            tokens, row = x[row.to(device), position.to(device)], row.to(device)
            for sae, mean in zip(saes, means, strict=True):
                total = torch.zeros(len(chosen), sae.d_sae, device=device)
                step = max(1, AT_ONCE // sae.d_sae)
                for first in range(0, len(tokens), step):
                    features = sae.encode(tokens[first : first + step])
                    total.index_add_(0, row[first : first + step], features)
                mean[chosen] = (total.cpu() / torch.from_numpy(rows[chosen])[:, None]).numpy()
            advance(len(chosen))
    return means, rows, sum(len(ids) > subject.n_ctx for ids in whole)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def bound(d_sae: int) -> float:
    """Largest possible z-score among d_sae numbers, with the sample standard deviation."""
    return (d_sae - 1) / d_sae**0.5


def largest_z(x: np.ndarray) -> np.ndarray:
    """Largest z-score of each row of `x [rows, n]`; 0 for a row of equal numbers."""
    x = x.astype(np.float64)
    centred = x - x.mean(1, keepdims=True)
    spread = centred.std(1, ddof=1)
    return centred.max(1) / np.where(spread == 0, 1, spread)


def scores(means: np.ndarray, tokens: np.ndarray, rows_at_once: int = 256) -> dict[str, dict[str, np.ndarray]]:
    """Scores of one SAE: {"published", "corrected": {score: one value for each pair}}.

    Args:
        means: `[2·pairs, d_sae]`, all first stories, then all second stories. tokens: `[2·pairs]`.
    """
    pairs, d_sae = len(means) // 2, means.shape[1]
    parts = [slice(i, min(i + rows_at_once, pairs)) for i in range(0, pairs, rows_at_once)]

    def means_of(part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(V₁, V₂, I) of a range of pairs."""
        second = slice(part.start + pairs, part.stop + pairs)
        first_tokens, second_tokens = tokens[part, None], tokens[second, None]
        a, b = means[part].astype(np.float64), means[second].astype(np.float64)
        return a, b, (first_tokens * a + second_tokens * b) / (first_tokens + second_tokens)

    average = np.zeros(d_sae)
    for part in parts:
        average += means_of(part)[2].sum(0)
    values: dict = {"published": {s: [] for s in SCORES}, "corrected": {s: [] for s in SCORES}}
    for part in parts:
        a, b, story = means_of(part)
        contrast = np.abs(a - b)
        for variant, centre in (("published", 0.0), ("corrected", average / pairs)):
            independence = np.abs(story - centre)
            for name, value in zip(SCORES, (contrast, independence, contrast + independence), strict=True):
                values[variant][name].append(largest_z(value))
    return {v: {name: np.concatenate(x) for name, x in arrays.items()} for v, arrays in values.items()}


def refuse_unreachable(minimum: float, reference: float | None = None) -> None:
    """Raise BadInput if no SAE can exceed its reference by `minimum`. Normalised scores are at most 1.

    Args:
        reference: normalised score of the reference; None if unknown.
    """
    if not within_reach(reference or 0.0, minimum):
        known = "" if reference is None else f", of which a reference already reaches {reference:.4f}"
        raise BadInput(
            f"--min-delta {minimum}: cannot be reached; a normalised score is at most 1{known} "
            f"(the largest z-score of n numbers is (n − 1)/√n)"
        )
