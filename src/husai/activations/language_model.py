"""Harvests activations of a language model: of every token for stores, of each prompt's last token for sae-probes.

The subject's tokenizer makes the inputs. Batches hold inputs of similar length, padded on the right. Padding does not
change earlier positions. A pass stops at the last layer that is needed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import time
import warnings
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from husai.activations.harvest import check_hook
from husai.activations.outliers import without_outliers
from husai.activations.store import ActivationStore, StoreWriter, TextUsed
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, locked, publish_directory, read_json, write_bytes, write_json
from husai.runs.progress import progress
from husai.runs.seeds import generator
from husai.runs.subjects import DType
from husai.subjects import text
from husai.subjects.pretrained import LanguageModel
from husai.subjects.sources import Side

log = logging.getLogger("husai")
BATCH_TOKENS = 8192
PART_ROWS = 65_536  # rows of a part; an interruption loses at most one part
ARRAYS = ("owner", "start", "rows", "length", "document")
"""Fields of `Inputs` that hold a number for each input."""
SENTENCE = "The quick brown fox jumps over the lazy dog."
HASHED = 2**28 - 1
"""Bits of a document's number that decide whether a store holds it out. Other bits of its hash decide its side."""


@dataclass(frozen=True)
class Hook:
    """Facts of a hook, measured on two short inputs."""

    d_in: int
    """Width of its rows."""
    of_token: bool
    """Whether a row depends on its token alone, as at the token embedding."""


def check_hooks(subject: LanguageModel, hook_names: list[str], by_document: bool = False) -> dict[str, Hook]:
    """Facts of each hook. Warns of rows that depend on the token alone, because they are held out by token.

    Raises:
        BadInput: the subject lacks the hook, it never fires, or its rows do not depend on the text.
    """
    facts = {hook: inspect_hook(subject, hook) for hook in hook_names}
    for hook in [hook for hook, hook_facts in facts.items() if hook_facts.of_token and not by_document]:
        log.warning(
            "%s of %s gives one row for each token, whatever precedes it, as the token embedding does. Held-out rows "
            "and training rows share no tokens; a hook of a later block is more informative",
            *(hook, subject.name),
        )
    return facts


def inspect_hook(subject: LanguageModel, hook: str) -> Hook:
    """Run two inputs of six tokens, made of three different ones, and compare rows.

    The name of a hook does not show on which tokens its rows depend.

    The tokens come from a sentence. Unused tokens, with which many vocabularies begin, may have equal embeddings.

    Raises:
        BadInput: as `check_hooks`.
    """
    check_hook(subject.model, hook)
    ids = subject.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    a, b, c, *_ = dict.fromkeys([*ids, *range(len(subject.tokenizer))])
    inputs = [np.array(ids) for ids in ([a, b, a, c, a, b], [b, c, b, a, c, c])]
    with warnings.catch_warnings(action="ignore"):  # of a hook that never fires, which `run` refuses
        rows = run(subject, inputs, [hook])[hook]
    if rows.shape[:2] != (2, 6) or _equal(subject, rows[0], rows[1]):
        raise BadInput(
            f"--hook-name {hook}: its rows in {subject.name} do not depend on the text; a hook of it expected"
        )
    return Hook(rows.shape[2], _equal(subject, rows[0, 2], rows[0, 4]))


def _equal(subject: LanguageModel, one: Tensor, other: Tensor) -> bool:
    """True if rows are equal up to rounding of the subject's arithmetic."""
    rounding = max(1e-5, torch.finfo(getattr(torch, subject.dtype)).eps / 2)
    return bool((one - other).norm() <= rounding * torch.maximum(one.norm(), other.norm()))


@torch.inference_mode()
def run(subject: LanguageModel, inputs: list[np.ndarray], hook_names: list[str]) -> dict[str, Tensor]:
    """Output of each hook, `[len(inputs), longest, d_in]`, including padding, as float32."""
    longest = max(map(len, inputs))
    tokens = torch.zeros(len(inputs), longest, dtype=torch.long)
    for row, tokens_of_row in enumerate(inputs):
        tokens[row, : len(tokens_of_row)] = torch.from_numpy(tokens_of_row)
    stop, at_stop = where_to_stop(hook_names)
    device = next(subject.model.parameters()).device
    cached = [hook for hook in hook_names if hook != at_stop]
    with subject.harvesting.autocast(device):
        output, cache = subject.model.run_with_cache(tokens.to(device), names_filter=cached, stop_at_layer=stop)
    if silent := [hook for hook in cached if hook not in cache]:
        raise BadInput(f"--hook-name {silent[0]}: it never fires in {subject.name}; a hook that fires expected")
    rows_of_hook = {hook: (output if hook == at_stop else cache[hook]).float() for hook in hook_names}
    one_head = subject.harvesting.hook_head_index is not None
    for hook, x in rows_of_hook.items():
        if x.ndim == 4 and (hook.endswith("hook_z") or one_head):  # attention heads are concatenated
            x = x.flatten(2)
        if x.ndim != 3:
            raise BadInput(
                f"--hook-name {hook}: its output has shape {list(x.shape)}; [batch, position, d_in] expected"
            )
        rows_of_hook[hook] = subject.harvesting.read_by_sae(x, hook, subject.heads(hook))
    return rows_of_hook


def where_to_stop(hook_names: list[str]) -> tuple[int | None, str | None]:
    """(block before which a pass stops, None for no stop; hook that equals the output of the stopped pass, or None).

    The input of a block is available without running the block.
    """
    layers = {hook: int(m[1]) if (m := re.match(r"blocks\.(\d+)\.", hook)) else None for hook in hook_names}
    known = [layer for layer in layers.values() if layer is not None]
    if len(known) < len(layers):
        return None, None
    last = max(known)
    at_stop = f"blocks.{last}.hook_resid_pre"
    if last > 0 and [hook for hook, layer in layers.items() if layer == last] == [at_stop]:
        return last, at_stop
    return last + 1, None


def batches(lengths: np.ndarray, batch_tokens: int = BATCH_TOKENS) -> list[np.ndarray]:
    """Batches of input numbers, by length, with at most `batch_tokens` including padding; at least one input each."""
    order = np.argsort(lengths, kind="stable")
    cut, first = [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or (i + 1 - first) * lengths[order[i]] > batch_tokens:
            cut.append(order[first:i])
            first = i
    return cut


# ---------------------------------------------------------------------------------------------------------------------
# Every token


@dataclass(frozen=True)
class Inputs:
    """Documents cut into inputs of at most n_ctx tokens.

    Position 0 of an input gives no row. It holds the token that begins every text or, without such a token, one that
    attends to itself alone. `Harvesting` may exclude other positions.

    An object holds the place of each input, not its tokens. Texts of a list are tokenised again when needed. Tokens of
    a stream lie on disk.
    """

    tokenizer: Any
    texts: list[str] | None  # None for a stream
    stream: Path | None  # int32 tokens of the documents of a stream, concatenated
    begins: list[int]  # tokens before a text
    owner: np.ndarray  # [inputs], number of the document in `texts`, or in the stream
    start: np.ndarray  # [inputs], first token in the document, or in the file of a stream
    rows: np.ndarray  # [inputs], number of rows
    length: np.ndarray  # [inputs], number of tokens, including those before the text
    document: np.ndarray  # [inputs] int64, the first 60 bits of the document's sha256
    counts: np.ndarray  # [vocabulary], number of rows of each token
    digest: str  # sha256 (hex) of documents and tokens
    used: TextUsed | None = None  # facts of a stream's text

    @classmethod
    def of(
        cls, subject: LanguageModel, documents: list[str] | Side, rows: int, seed: int, root: Path | None = None
    ) -> Inputs:
        """Inputs that give exactly `rows` rows. The last input is cut to meet the number.

        Documents of a list are taken in random order, those of a stream in the stream's order.

        Args:
            root: folder that holds the tokens of a stream. They are read from the stream once.

        Raises:
            BadInput: all documents together give fewer rows.
        """
        if isinstance(documents, Side):
            assert root is not None
            return _of_stream(subject, documents, rows, root)
        cut, order = Cutter(subject, rows), torch.randperm(len(documents), generator=generator(seed, "documents"))
        for chosen in order.split(512):
            if cut.missing == 0:
                break
            texts = [documents[i] for i in chosen]
            encoded = subject.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for i, one, tokens in zip(chosen.tolist(), texts, encoded, strict=True):
                cut.add(i, text.document_id(one), np.array(tokens, dtype=np.int64))
        if cut.missing > 0:
            raise BadInput(f"--rows {rows}: the chosen documents give {rows - cut.missing} rows of activations")
        arrays: dict[str, Any] = dict(zip(ARRAYS, cut.arrays(), strict=True)) | {"counts": cut.counts}
        return cls(subject.tokenizer, documents, None, cut.begins, **arrays, digest=cut.sha.hexdigest())

    def tokens(self, part: range) -> list[np.ndarray]:
        """Tokens of these inputs, including position 0."""
        if self.texts is None:
            assert self.stream is not None
            lengths = self.length - len(self.begins)
            on_disk: np.ndarray = np.memmap(self.stream, dtype=np.int32, mode="r")
            pieces = [on_disk[self.start[i] : self.start[i] + lengths[i]] for i in part]
            return [np.concatenate([np.array(self.begins, dtype=np.int64), piece]) for piece in pieces]
        owners = sorted({int(self.owner[i]) for i in part})
        encoded = self.tokenizer([self.texts[o] for o in owners], add_special_tokens=False)["input_ids"]
        of_owner = dict(zip(owners, encoded, strict=True))
        token_rows = []
        for i in part:
            piece = of_owner[int(self.owner[i])][self.start[i] :]
            token_rows.append(np.array([*self.begins, *piece])[: self.length[i]])
        return token_rows

    def parts(self) -> list[range]:
        """Ranges of neighbouring inputs with about PART_ROWS rows each."""
        number = (np.cumsum(self.rows) - 1) // PART_ROWS
        edges = np.flatnonzero(np.diff(number, prepend=-1))
        return [range(a, b) for a, b in zip(edges, [*edges[1:], len(number)], strict=True)]

    def heldout_documents(self, fraction: float) -> np.ndarray:
        """Mask of inputs in held-out documents, `[inputs]` bool, with about this share of the rows.

        A list holds out its last documents, at least one. A stream holds out documents by hash, therefore more rows
        keep the split.
        """
        if self.used is not None:
            return (self.document & HASHED) < fraction * (HASHED + 1)
        before = np.cumsum(self.rows) - self.rows
        _, first, document = np.unique(self.document, return_index=True, return_inverse=True)
        begins = before[first][document]  # the first row of each input's document
        return begins >= min((1 - fraction) * self.rows.sum(), begins[-1])

    def heldout_tokens(self, fraction: float, seed: int) -> np.ndarray:
        """Sorted random set of tokens, at least one, with at most this share of the rows."""
        seen = np.flatnonzero(self.counts)
        order = seen[torch.randperm(len(seen), generator=generator(seed, "tokens")).numpy()]
        total = np.cumsum(self.counts[order])
        return np.sort(order[total <= max(fraction * self.counts.sum(), total[0])])


class Cutter:
    """Cuts documents into inputs until they give enough rows."""

    def __init__(self, subject: LanguageModel, rows: int):
        tokenizer, self.harvesting = subject.tokenizer, subject.harvesting
        self.begins = self.harvesting.begins(tokenizer)
        self.size = subject.n_ctx - len(self.begins)
        self.missing, self.sha = rows, hashlib.sha256()
        self.counts = np.zeros(len(tokenizer), np.int64)
        self.found = [array("q") for _ in range(5)]  # owner, start, rows, length, document of each input

    def add(self, owner: int, sha256: str, tokens: np.ndarray, first: int = 0) -> None:
        """Add the inputs of a document.

        Args:
            first: place of the document's first token in the file of a stream; 0 for a list.
        """
        number, begins = int(sha256[:15], 16), np.array(self.begins, dtype=np.int64)
        for start in range(0, len(tokens), self.size):
            piece = np.concatenate([begins, tokens[start : start + self.size]])
            kept = np.flatnonzero(self.harvesting.kept(piece))[: self.missing]
            if len(kept) > 0:
                piece = piece[: kept[-1] + 1]  # later tokens change no row
                values = owner, first + start, len(kept), len(piece), number
                for column, value in zip(self.found, values, strict=True):
                    column.append(value)
                self.sha.update(number.to_bytes(8, "big") + piece.tobytes())
                np.add.at(self.counts, piece[kept], 1)
                self.missing -= len(kept)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """owner, start, rows, length and document of each input."""
        return tuple(np.array(values, dtype=np.int64) for values in self.found)


def _of_stream(subject: LanguageModel, side: Side, rows: int, root: Path) -> Inputs:
    """Inputs of a stream. One pass writes its tokens below `root`; later calls find them."""
    tokenizer = subject.tokenizer
    key = {"side": [str(side.source), side.source.fingerprint(), side.heldout], "rows": rows, "n_ctx": subject.n_ctx}
    key |= {"tokenizer": tokenizer_digest(tokenizer), "code": code_version(Inputs.of)}
    key |= {"harvesting": subject.harvesting.to_json()}
    folder = root / "texts" / digest(key)[:16]

    def build(partial: Path) -> None:
        cut, reading, number, first = Cutter(subject, rows), side.read(tokenizer), 0, 0
        with open(partial / "tokens.int32", "wb") as f, progress(f"reading {side.source.name} (rows)", rows) as advance:
            for documents in batched(reading, 256):
                texts = [d.text for d in documents if d.tokens is None]
                encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
                before = cut.missing
                for d in documents:
                    if cut.missing == 0:
                        break
                    tokens = np.array(next(encoded), dtype=np.int32) if d.tokens is None else d.tokens
                    if cut.begins and tokens[:1] == cut.begins:  # packed ids may hold it already
                        tokens = tokens[1:]
                    cut.add(number, d.sha256, tokens, first)
                    f.write(tokens.tobytes())
                    number, first = number + 1, first + len(tokens)
                advance(before - cut.missing)
                if cut.missing == 0:
                    break
            f.flush()
            os.fsync(f.fileno())
        record = reading.record | {"documents": number}
        if cut.missing > 0:
            side_of = "held-out" if side.heldout else "training"
            raise BadInput(
                f"--rows {rows}: {side.source} ended early; its {record['documents']} {side_of} documents give "
                f"{rows - cut.missing} rows; fewer rows or a larger source expected"
            )
        arrays = dict(zip(ARRAYS, map(torch.from_numpy, cut.arrays()), strict=True))
        write_bytes(partial / "inputs.safetensors", save(arrays | {"counts": torch.from_numpy(cut.counts)}))
        write_json(partial / "manifest.json", {"begins": cut.begins, **record, "digest": cut.sha.hexdigest()})

    publish_directory(folder, build)
    record_on_disk = read_json(folder / "manifest.json", "text")
    arrays = {name: t.numpy() for name, t in load_file(folder / "inputs.safetensors").items()}
    begins = record_on_disk.pop("begins")
    fields: dict[str, Any] = arrays | {"digest": record_on_disk["digest"], "used": TextUsed(**record_on_disk)}
    return Inputs(tokenizer, None, folder / "tokens.int32", begins, **fields)


def batched(documents: Iterable, n: int) -> Iterator[list]:
    """Lists of n neighbouring documents."""
    left = iter(documents)
    while batch := [*islice(left, n)]:
        yield batch


def tokenizer_digest(tokenizer) -> str:
    """sha256 of a tokenizer's definition, or of its vocabulary if the definition cannot be serialised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest(sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str())


def harvest_tokens(
    subject: LanguageModel,
    hook_names: list[str],
    documents: list[str] | Side,
    root: Path,
    rows: int,
    row_seed: int = 0,
    heldout_fraction: float = 0.2,
    dtype: DType | None = None,
    threads: int = 1,
    force: bool = False,
    by_document: bool = False,
) -> dict[str, Path]:
    """One store for each hook, all from one pass; existing stores are reused. Rows are shuffled over all documents.

    Held-out rows come last. They share no documents with training rows (at the embedding: no tokens). Rows of the
    stores of one pass correspond, except the embedding's. Memory: the texts, and one part or shard.

    Args:
        by_document: hold out documents at the embedding too, which makes its rows correspond to those of other hooks.
        documents: distinct texts, or a side of a stream.
        root: folder of stores. The name of a store is a digest of its inputs.
        dtype: type of the stored numbers. None: the subject's type, which is lossless.

    Returns:
        {hook: folder}
    """
    dtype = dtype or subject.dtype
    hooks = check_hooks(subject, hook_names, by_document)
    inputs = Inputs.of(subject, documents, rows, row_seed, root)
    device = next(subject.model.parameters()).device.type
    key_of_pass = {
        "subject": subject.activations_digest,
        "inputs": inputs.digest,
        "row_seed": row_seed,
        "heldout_fraction": heldout_fraction,
        "dtype": dtype,
        "code": code_version(harvest_tokens),
        "device": device,
        "threads": threads,
    }
    by_token = {name: hook.of_token and not by_document for name, hook in hooks.items()}
    keys = {hook: key_of_pass | {"hook": hook, "by_token": by_token[hook]} for hook in hook_names}
    folders = {hook: root / f"{subject.name}-{digest(key)[:16]}" for hook, key in keys.items()}
    work = root / f".{subject.name}-{digest([key_of_pass, by_document])[:16]}.work"
    with locked(work.with_suffix(".lock")):
        missing = [hook for hook in hook_names if force or not folders[hook].exists()]
        if missing:
            plans = {h: Plan.of(inputs, heldout_fraction, row_seed, by_token[h]) for h in missing}
            if force:
                shutil.rmtree(work, ignore_errors=True)
            _harvest(subject, inputs, plans, dtype, work)
            for hook, plan in plans.items():
                build = partial(_merge, subject, hook, plan, work, inputs, dtype)
                publish_directory(folders[hook], build, force)
            shutil.rmtree(work)
    if multiple := subject.harvesting.max_norm_multiple:
        stores = {hook: ActivationStore.open(folder) for hook, folder in folders.items()}
        return {hook: without_outliers(s, multiple, root, force=force).folder for hook, s in stores.items()}
    return folders


def _harvest(subject: LanguageModel, inputs: Inputs, plans: dict[str, Plan], dtype: DType, work: Path) -> None:
    """Run all parts whose files are missing."""
    began, done = time.monotonic(), 0
    with progress(f"harvesting {', '.join(plans)} (rows)", int(inputs.rows.sum())) as advance:
        for number, part in enumerate(inputs.parts()):
            missing = {h: p for h, p in plans.items() if not (work / f"{h}-{number:05d}.safetensors").exists()}
            n = int(inputs.rows[part.start : part.stop].sum())
            if missing:
                _harvest_part(subject, inputs, part, number, missing, dtype, work)
                done += n
            advance(n)
    if done:
        log.info("%d rows for %s: %.0f tokens/s", done, ", ".join(plans), done / (time.monotonic() - began))


@dataclass(frozen=True)
class Plan:
    """Assignment of a hook's rows to buckets. The first `training_buckets` buckets hold the training rows.

    A bucket becomes a shard. It holds a random subset of the rows, which are shuffled when the shard is written.
    """

    heldout_inputs: np.ndarray | None  # [inputs] bool, if whole documents are held out
    heldout_tokens: np.ndarray | None  # sorted, if tokens are held out
    heldout_rows: int
    training_buckets: int
    buckets: int
    seed: int

    @classmethod
    def of(cls, inputs: Inputs, fraction: float, seed: int, hold_out_tokens: bool) -> Plan:
        by_input = by_token = None
        if hold_out_tokens:
            by_token = inputs.heldout_tokens(fraction, seed)
            heldout = int(inputs.counts[by_token].sum())
        else:
            by_input = inputs.heldout_documents(fraction)
            heldout = int(inputs.rows[by_input].sum())
        total = int(inputs.rows.sum())
        if not 0 < heldout < total:
            raise BadInput(f"--rows {total}: too few documents to hold some out; more rows needed")
        training = -(-(total - heldout) // PART_ROWS)
        return cls(by_input, by_token, heldout, training, training + -(-heldout // PART_ROWS), seed)

    def bucket(self, tokens: Tensor, owner: Tensor, part: int) -> Tensor:
        """Bucket of each row of a part, from its token and the number of its input."""
        if self.heldout_tokens is not None:
            held = torch.isin(tokens, torch.from_numpy(self.heldout_tokens))
        else:
            held = torch.from_numpy(self.heldout_inputs)[owner]
        draw = torch.rand(len(tokens), generator=generator(self.seed, "bucket", part), dtype=torch.float64)
        training = (draw * self.training_buckets).long()
        heldout = self.training_buckets + (draw * (self.buckets - self.training_buckets)).long()
        return torch.where(held, heldout, training)


def _harvest_part(
    subject: LanguageModel, inputs: Inputs, part: range, number: int, plans: dict[str, Plan], dtype: DType, work: Path
) -> None:
    """Run the inputs of a part, and write one file for each hook, with rows ordered by bucket."""
    rows_of_hook, tokens, owner = rows_of_part(subject, inputs, part, list(plans), dtype)
    document = torch.from_numpy(inputs.document)[owner]
    for hook, plan in plans.items():
        bucket = plan.bucket(tokens, owner, number)
        order = bucket.argsort(stable=True)
        tensors = {
            "activations": rows_of_hook[hook][order],
            "document": document[order],
            "token": tokens[order],
            "edges": torch.cat([torch.zeros(1, dtype=torch.long), bucket.bincount(minlength=plan.buckets).cumsum(0)]),
        }
        write_bytes(work / f"{hook}-{number:05d}.safetensors", save(tensors))


def rows_of_part(
    subject: LanguageModel, inputs: Inputs, part: range, hook_names: list[str], dtype: DType
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(rows of each hook `[n, d_in]` on the CPU, token of each row `[n]`, number of its input `[n]`).

    The result depends on the part alone, not on the order in which parts run.
    """
    token_rows = inputs.tokens(part)
    lengths = np.array([*map(len, token_rows)])
    rows_of_hook: dict[str, list[Tensor]] = {hook: [] for hook in hook_names}
    tokens, owner = [], []
    kept = [np.flatnonzero(subject.harvesting.kept(one)) for one in token_rows]
    for chosen in batches(lengths):
        outputs = run(subject, [token_rows[i] for i in chosen], hook_names)
        for hook, x in outputs.items():
            rows_of_hook[hook] += [x[row, kept[i]].to(getattr(torch, dtype)).cpu() for row, i in enumerate(chosen)]
        tokens += [torch.from_numpy(token_rows[i][kept[i]]) for i in chosen]
        owner += [torch.full((len(kept[i]),), part[i]) for i in chosen]
    return {hook: torch.cat(rows) for hook, rows in rows_of_hook.items()}, torch.cat(tokens), torch.cat(owner)


def _merge(
    subject: LanguageModel, hook: str, plan: Plan, work: Path, inputs: Inputs, dtype: DType, folder: Path
) -> None:
    """Gather each bucket from all parts, shuffle it, and append it to the store."""
    writer, parts = None, len(inputs.parts())
    for bucket in range(plan.buckets):
        pieces: dict[str, list[Tensor]] = {"activations": [], "document": [], "token": []}
        for number in range(parts):
            with safe_open(work / f"{hook}-{number:05d}.safetensors", framework="pt") as f:
                first, last = f.get_tensor("edges")[bucket : bucket + 2].tolist()
                for name, piece in pieces.items():
                    piece.append(f.get_slice(name)[first:last])
        rows = {name: torch.cat(piece) for name, piece in pieces.items()}
        if len(rows["token"]) == 0:
            continue
        order = torch.randperm(len(rows["token"]), generator=generator(plan.seed, "shuffle", bucket))
        x = rows.pop("activations")[order].float()
        writer = writer or StoreWriter(folder, x.shape[1], dtype)
        writer.append(x, {name: label[order] for name, label in rows.items()})
    position = "every token but the first" + ("" if plan.heldout_tokens is None else "; held out by token")
    assert writer is not None  # a harvest has rows
    facts = subject.name, subject.digest, hook, position, plan.seed, subject.control
    departs = replace(subject.harvesting, max_norm_multiple=None).to_json() or None
    writer.finish(*facts, heldout_rows=plan.heldout_rows, text=inputs.used, harvesting=departs)


# ---------------------------------------------------------------------------------------------------------------------
# The last token of each prompt


def harvest_prompts(
    subject: LanguageModel, hook_names: list[str], data_sets: list[str], cache: Path, force: bool = False
) -> Path:
    """Write `<data set>_<hook>.pt` files, each a tensor `[prompts, d_in]`, at the place where sae-probes reads them.

    `sae_probes.run_sae_evals(model_name=subject.name, model_cache_path=cache, …)` then runs without a model. Existing
    files are kept, therefore the same call resumes.

    Returns:
        `<cache>/model_activations_<subject.name>`. The folder of shifted sets has `_OOD` at the end of its name.

    Raises:
        BadInput: the folder holds another subject's activations.
    """
    check_hooks(subject, hook_names)
    folder = cache / f"model_activations_{subject.name}"
    facts = {"subject": subject.activations_digest, "n_ctx": subject.n_ctx}
    for place in {folder.with_name(folder.name + ("_OOD" if name.endswith("_OOD") else "")) for name in data_sets}:
        if not (place / "subject.json").exists():
            write_json(place / "subject.json", facts)
        if read_json(place / "subject.json", "activations of prompts") != facts:
            raise BadInput(f"{place} holds the activations of another subject; delete it or name another folder")
    tokenizer = subject.tokenizer
    began, done = time.monotonic(), 0
    with progress("harvesting prompts (data sets)", len(data_sets)) as advance:
        for name in data_sets:
            place = folder.with_name(folder.name + ("_OOD" if name.endswith("_OOD") else ""))
            missing = [h for h in hook_names if force or not (place / f"{name}_{h}.pt").exists()]
            if missing:
                prompts = text.documents(name)
                encoded = subject.harvesting.encode(tokenizer, prompts, subject.n_ctx, "left")  # as sae-probes does
                inputs = [np.array(ids) for ids in encoded]
                lengths = np.array([*map(len, inputs)])
                last = {hook: [None] * len(inputs) for hook in missing}
                for chosen in batches(lengths):
                    for hook, x in run(subject, [inputs[i] for i in chosen], missing).items():
                        for row, i in enumerate(chosen):
                            last[hook][i] = x[row, lengths[i] - 1].clone().cpu()
                for hook in missing:
                    buffer = io.BytesIO()
                    torch.save(torch.stack(last[hook]), buffer)
                    write_bytes(place / f"{name}_{hook}.pt", buffer.getvalue())
                done += int(lengths.sum())
            advance(1)
    if done:
        log.info("%d tokens for %s: %.0f tokens/s", done, ", ".join(hook_names), done / (time.monotonic() - began))
    return folder
