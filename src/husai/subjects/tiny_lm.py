"""husai-tiny: a small GPT-NeoX language model (the architecture of Pythia), trained from scratch on real text.

It replaces Pythia where no weights can be downloaded. The text is the training side of `data_sets.FAMILIES`, and gives
a byte-level BPE tokenizer first. A document is a row of tokens that ends with END. It is cut into windows of at most
`n_ctx` targets. A window starts with END, and each target is predicted from the preceding tokens of its window. Batches
hold windows of similar length, because little padding is then needed. Muon trains the matrices of the blocks, AdamW all
other parameters.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from husai.evidence import rules
from husai.runs.errors import BadInput
from husai.runs.files import digest, publish_directory, read_json, sha256_file, write_bytes, write_json, write_text
from husai.runs.machine import keep_freed_memory
from husai.runs.progress import progress
from husai.runs.seeds import derive_seed, generator
from husai.subjects.ngrams import WittenBell
from husai.subjects.text import Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import GPTNeoXForCausalLM

log = logging.getLogger("husai")
END = 0  # the token <|endoftext|>, before and after every document
IGNORED = -100
STATE, TOKENIZER, LOG, DIGESTS = "state.safetensors", "tokenizer.json", "training.json", "digests.json"


@dataclass(frozen=True)
class TinyLMConfig:
    """The model and its training."""

    vocabulary: int = 4096
    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 4
    d_mlp: int = 1024
    n_ctx: int = 256
    tokens: int = 24_000_000
    """Number of targets seen in training, including repeats."""
    batch_tokens: int = 4096
    """Number of tokens of a step, including padding."""
    learning_rate: float = 2e-3
    """Learning rate of Muon (matrices of the blocks; updates scaled to AdamW's size) and AdamW (other parameters)."""
    warmup_tokens: int = 600_000
    decay_fraction: float = 0.35
    """The learning rate falls linearly to zero over this last share of the tokens."""
    weight_decay: float = 0.1
    """Decay of matrices."""
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    """Largest norm of the gradient."""
    history_tokens: int = 500_000
    """Number of tokens between two rows of the history."""
    seed: int = 42

    def learning_rate_factor(self, tokens: int) -> float:
        """Factor of the learning rate by tokens seen so far: linear warm-up, constant, linear decay to zero."""
        warmup = (tokens + self.batch_tokens) / self.warmup_tokens
        decay = (self.tokens - tokens) / (self.decay_fraction * self.tokens)
        return max(0.0, min(1.0, warmup, decay))


# ---------------------------------------------------------------------------------------------------------------------
# Text to windows


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Train byte-level BPE with END as token 0. With special tokens, END precedes a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    name = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[name], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, END)])
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token numbers of each text, int32, END last."""
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([*e.ids, END], dtype=np.int32) for e in encoded]


@dataclass(frozen=True)
class Windows:
    """Documents cut into windows of at most n_ctx targets. Window i is `stream[starts[i] : starts[i] + lengths[i]]`.

    Neighbouring windows may overlap. The first `context[i]` targets of a window are context and are not scored again.
    """

    stream: np.ndarray  # [tokens] int32, concatenated documents
    starts: np.ndarray  # [windows]
    lengths: np.ndarray  # [windows]
    context: np.ndarray  # [windows]
    end: int = END

    @classmethod
    def of(cls, documents: list[np.ndarray], n_ctx: int, end: int = END, overlap: int = 0) -> Windows:
        starts, lengths, context, first = [], [], [], 0
        for document in documents:
            for offset in range(0, max(1, len(document) - overlap), n_ctx - overlap):
                starts.append(first + offset)
                lengths.append(min(n_ctx, len(document) - offset))
                context.append(overlap if offset else 0)
            first += len(document)
        return cls(np.concatenate(documents), np.array(starts), np.array(lengths), np.array(context), end)

    def batch(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """(inputs, targets), each `[rows, longest]`. Inputs are targets shifted by one; padding targets are IGNORED."""
        longest = self.lengths[chosen].max()
        inputs = torch.full((len(chosen), longest), self.end)
        targets = torch.full((len(chosen), longest), IGNORED)
        for row, i in enumerate(chosen):
            tokens = torch.from_numpy(self.stream[self.starts[i] : self.starts[i] + self.lengths[i]].astype(np.int64))
            inputs[row, 1 : len(tokens)] = tokens[:-1]
            targets[row, self.context[i] : len(tokens)] = tokens[self.context[i] :]
        return inputs, targets

    def batches(self, order: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
        """Batches of windows of similar length, at most `batch_tokens` with padding, at least one window each."""
        by_length = order[np.argsort(self.lengths[order], kind="stable")]
        cut, first = [], 0
        for i in range(1, len(by_length) + 1):
            if i == len(by_length) or (i + 1 - first) * self.lengths[by_length[i]] > batch_tokens:
                cut.append(by_length[first:i])
                first = i
        return cut

    def epoch(self, batch_tokens: int, *seed: int | str) -> list[np.ndarray]:
        """Batches with all windows once, in random order. Only small random parts are sorted by length."""
        g = generator(*seed)
        order = torch.randperm(len(self.starts), generator=g).numpy()
        batches = []
        for part in np.array_split(order, max(1, len(order) // 4096)):
            cut = self.batches(part, batch_tokens)
            batches += [cut[i] for i in torch.randperm(len(cut), generator=g)]
        return batches


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build_model(config: TinyLMConfig) -> GPTNeoXForCausalLM:
    """The untrained model, seeded."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "model"))
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.d_model,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                intermediate_size=config.d_mlp,
                max_position_embeddings=config.n_ctx,
                rotary_pct=0.25,
                bos_token_id=END,
                eos_token_id=END,
                attn_implementation="eager",  # at this size faster on a CPU than the fused kernel
            )
        )


def cross_entropy(model: GPTNeoXForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy over the targets, in nats."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def nats(model: GPTNeoXForCausalLM, windows: Windows, chosen: np.ndarray, batch_tokens: int = 4096) -> float:
    """Sum of the cross-entropy over the chosen windows, in nats."""
    device = model.device
    batches = windows.batches(chosen, batch_tokens)
    return sum(cross_entropy(model, *(t.to(device) for t in windows.batch(b))).item() for b in batches)


@dataclass
class Progress:
    """Position of a training. With the tensors of model and optimisers it suffices to resume."""

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch
    loss_sum: float = 0.0  # nats since the last history row
    loss_tokens: int = 0


def train(
    config: TinyLMConfig,
    training: Windows,
    heldout: Windows,
    device: torch.device,
    state_path: Path,
    seconds_between_saves: float = 60.0,
) -> tuple[GPTNeoXForCausalLM, list[dict]]:
    """Train on `training` in bfloat16 autocast. The state is saved regularly, and the same call resumes from it.

    Returns:
        (the model; history: rows of tokens seen, learning rate, training loss since the previous row, and loss on a
        sample of the held-out windows, both in nats a token)
    """
    keep_freed_memory()
    model = build_model(config).to(device)
    optimizers = make_optimizers(model, config)
    sample = torch.randperm(len(heldout.starts), generator=generator(config.seed, "heldout")).numpy()[:128]
    sample_tokens = int(heldout.lengths[sample].sum())
    key = digest(
        {
            "config": asdict(config),
            "training": hashlib.sha256(training.stream.tobytes()).hexdigest(),
            "heldout": hashlib.sha256(heldout.stream.tobytes()).hexdigest(),
        }
    )
    at, history = _restore(state_path, key, model, optimizers)
    every = config.history_tokens
    saved = time.monotonic()
    with progress("training the language model (tokens)", config.tokens, at.tokens) as advance:
        batches = training.epoch(config.batch_tokens, config.seed, "batches", at.epoch)
        while at.tokens < config.tokens:
            if at.batch == len(batches):
                at.epoch, at.batch = at.epoch + 1, 0
                batches = training.epoch(config.batch_tokens, config.seed, "batches", at.epoch)
            inputs, targets = (t.to(device) for t in training.batch(batches[at.batch]))
            n = int((targets != IGNORED).sum())
            rate = config.learning_rate * config.learning_rate_factor(at.tokens)
            for group in [g for optimizer in optimizers for g in optimizer.param_groups]:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16):
                loss = cross_entropy(model, inputs, targets) / n
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            at.step, at.tokens, at.batch = at.step + 1, at.tokens + n, at.batch + 1
            at.loss_sum, at.loss_tokens = at.loss_sum + loss.item() * n, at.loss_tokens + n
            advance(n)
            if at.tokens // every > (at.tokens - n) // every or at.tokens >= config.tokens:
                row = {
                    "tokens": at.tokens,
                    "learning_rate": rate,
                    "train_loss": at.loss_sum / at.loss_tokens,
                }
                with torch.autocast(device.type, torch.bfloat16):
                    row["heldout_loss"] = nats(model, heldout, sample) / sample_tokens
                history.append(row)
                at.loss_sum, at.loss_tokens = 0.0, 0
                log.info("%d tokens: loss %.3f, held out %.3f", at.tokens, row["train_loss"], row["heldout_loss"])
            if time.monotonic() - saved > seconds_between_saves:
                _save(state_path, key, model, optimizers, at, history)
                saved = time.monotonic()
    if not all(math.isfinite(row["train_loss"]) for row in history):
        raise BadInput("training of the language model diverged: a lower --learning-rate is needed")
    _save(state_path, key, model, optimizers, at, history)
    return model.eval(), history


def make_optimizers(model: GPTNeoXForCausalLM, config: TinyLMConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and vectors.

    Muon: Jordan et al. 2024. Updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982).
    """
    blocks = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    embeddings = [model.gpt_neox.embed_in.weight, model.lm_head.weight]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    rate, decay = config.learning_rate, config.weight_decay
    groups = [{"params": embeddings, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(blocks, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=config.betas, fused=True),
    ]


HISTORY = ("tokens", "learning_rate", "train_loss", "heldout_loss")
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


def _save(path: Path, key: str, model, optimizers, at: Progress, history: list[dict]) -> None:
    tensors = {"history": torch.tensor([[row[n] for n in HISTORY] for row in history], dtype=torch.float64)}
    tensors["progress"] = torch.tensor([*asdict(at).values()], dtype=torch.float64)
    for name, p in model.named_parameters():
        tensors[name] = p.detach()
        for state in (optimizer.state[p] for optimizer in optimizers if p in optimizer.state):
            tensors |= {f"{name}.{moment}": state[moment] for moment in MOMENTS if moment in state}
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(tensors, metadata={"key": key, "sha256": _fingerprint(tensors)}))


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()


@torch.no_grad()
def _restore(path: Path, key: str, model, optimizers) -> tuple[Progress, list[dict]]:
    """Load an interrupted training into model and optimisers. Without one, training starts at step 0."""
    if not path.exists():
        return Progress(), []
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("key") != key:
                raise ValueError("it belongs to another training")
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("sha256") != _fingerprint(tensors):
            raise ValueError("it was changed after it was written")
    except (SafetensorError, OSError, ValueError) as error:
        log.warning("%s cannot be resumed (%s); training starts again", path, error)
        return Progress(), []
    values = tensors["progress"].tolist()
    kinds = [type(v) for v in asdict(Progress()).values()]
    at = Progress(*(kind(v) for kind, v in zip(kinds, values, strict=True)))
    for name, p in model.named_parameters():
        p.copy_(tensors[name])
        moments = {m: tensors[f"{name}.{m}"].to(p.device) for m in MOMENTS if f"{name}.{m}" in tensors}
        muon, adam = optimizers
        if "exp_avg" in moments:
            adam.state[p] = moments | {"step": torch.tensor(float(at.step), device=p.device)}
        else:
            muon.state[p] = moments
    rows = tensors["history"].reshape(-1, len(HISTORY)).tolist()
    log.info("training resumes at token %d", at.tokens)
    return at, [dict(zip(HISTORY, row, strict=True)) | {"tokens": int(row[0])} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte, and the criteria of a language model


def bits_per_byte(model, tokenise_texts, corpus: Corpus, vocabulary: int, n_ctx: int, end: int = END) -> dict:
    """Bits per byte of the model and of Witten–Bell n-grams on the same tokens and held-out documents.

    Bits are summed over all tokens of a document and its END. Bytes are those of its UTF-8 text. The n-grams are fitted
    on the training documents and read a document from its start. The model has a context of at least n_ctx/2 tokens,
    if the document has so many before the target, because windows overlap by half.

    Args:
        tokenise_texts: function texts -> token numbers of each text, the end token last.
        end: the end token, which also precedes each document.

    Returns:
        {"documents", "tokens", "bytes", "all": {model: bits per byte}, "families": {family: {model: bits per byte}}}
    """
    heldout = tokenise_texts(corpus.heldout)
    fitted = tokenise_texts(corpus.train)
    bits = {
        name: WittenBell(order, vocabulary, end).fit(fitted).bits(heldout)
        for order, name in enumerate(("unigram", "bigram", "trigram"), start=1)
    }
    per_document = np.repeat(np.arange(len(heldout)), [len(d) for d in heldout])
    bits = {name: np.bincount(per_document, weights=b) for name, b in bits.items()}
    windows = [Windows.of([document], n_ctx, end, overlap=n_ctx // 2) for document in heldout]
    bits["model"] = np.array([nats(model, w, np.arange(len(w.starts))) / math.log(2) for w in windows])
    sizes = np.array([len(text.encode()) for text in corpus.heldout])
    families = np.array(corpus.heldout_families)
    order = ("model", "trigram", "bigram", "unigram")

    def summary(chosen: np.ndarray) -> dict:
        return {name: float(bits[name][chosen].sum() / sizes[chosen].sum()) for name in order}

    return {
        "documents": len(heldout),
        "tokens": len(per_document),
        "bytes": int(sizes.sum()),
        "all": summary(np.ones(len(sizes), bool)),
        "families": {str(f): summary(families == f) for f in sorted(set(families))},
    }


def bars(figures: dict) -> list[dict]:
    """Criteria of a language model: bits per byte 20 % below the bigram's, and below the trigram's."""
    bits_of_all = figures["all"]
    return [
        {"bar": name, "value": bits_of_all["model"], "below": bound, "holds": bits_of_all["model"] < bound}
        for name, bound in (
            ("20 % below the bigram", rules.BELOW_BIGRAM * bits_of_all["bigram"]),
            ("below the trigram", bits_of_all["trigram"]),
        )
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The folder for transformers, with training.json, a model card and the digest of each file


def make(
    config: TinyLMConfig, corpus: Corpus, folder: Path, device: torch.device, threads: int, force: bool = False
) -> dict:
    """Train the model, or find it, as a Hugging Face folder; returns the content of its `training.json`.

    The state of an unfinished training lies beside the folder and is removed at the end.
    """
    from tokenizers import Tokenizer

    settings = {"config": json.loads(json.dumps(asdict(config))), "data_digest": corpus.digest}
    settings |= {"device": device.type, "threads": threads}
    if (folder / LOG).exists() and not force:
        record_on_disk = read_json(folder / LOG, "language model")
        if settings.items() <= record_on_disk.items():
            return record_on_disk
        raise BadInput(f"{folder} holds a language model of another configuration; --force replaces it")
    work = folder.with_name(f".{folder.name}-{digest(settings)[:8]}.work")
    if not (work / TOKENIZER).exists():
        log.info("making the tokenizer from %d documents", len(corpus.train))
        write_text(work / TOKENIZER, train_tokenizer(corpus.train, config.vocabulary).to_str(pretty=True))
    tokenizer = Tokenizer.from_file(str(work / TOKENIZER))
    training, heldout = (Windows.of(tokenise(tokenizer, t), config.n_ctx) for t in (corpus.train, corpus.heldout))
    log.info("%d documents, %d tokens to train on", len(corpus.train), len(training.stream))
    model, history = train(config, training, heldout, device, work / STATE)
    record = settings | {
        "documents": len(corpus.train),
        "distinct_tokens": len(training.stream),
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": history,
    }

    def build(partial: Path) -> None:
        save_folder(model, tokenizer, config, partial)
        record.update(measure(partial, corpus))
        write_card(partial, record)

    publish_directory(folder, build, replace=True)
    shutil.rmtree(work)
    return record


def measure(folder: Path, corpus: Corpus) -> dict:
    """{"bits_per_byte", "bars"} of the saved weights."""
    from tokenizers import Tokenizer
    from transformers import GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    c = model.config
    figures = bits_per_byte(model, lambda t: tokenise(tokenizer, t), corpus, c.vocab_size, c.max_position_embeddings)
    return {"bits_per_byte": figures, "bars": bars(figures)}


def write_card(folder: Path, record: dict) -> None:
    """Write training.json, the model card, and the digest of each file."""
    write_json(folder / LOG, record)
    write_text(folder / "README.md", model_card(record))
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != DIGESTS)
    write_json(folder / DIGESTS, {"files": {p.name: sha256_file(p) for p in files}})


def save_folder(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, config: TinyLMConfig, folder: Path) -> None:
    """Write the folder that transformers opens: weights in bfloat16, configuration and tokenizer."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    end = tokenizer.id_to_token(END)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=config.n_ctx,
    ).save_pretrained(folder)


def model_card(record: dict) -> str:
    """Text of the folder's README.md, from its training.json."""
    c, figures = record["config"], record["bits_per_byte"]
    order = ("model", "trigram", "bigram", "unigram")
    rows = [("all", figures["all"]), *figures["families"].items()]
    held = "; ".join(
        f"{b['bar']} ({b['value']:.3f} against {b['below']:.3f}): {'holds' if b['holds'] else 'missed'}"
        for b in record["bars"]
    )
    table = ["| family | model | trigram | bigram | unigram |", "|---|---|---|---|---|"]
    table += [f"| {name} | " + " | ".join(f"{row[m]:.3f}" for m in order) + " |" for name, row in rows]
    paragraphs = [
        "# husai-tiny",
        "A small language model to study where no weights can be downloaded: GPT-NeoX, the architecture of Pythia, "
        f"with {record['parameters']:,} parameters in bfloat16 ({c['n_layers']} layers, d_model {c['d_model']}, "
        f"{c['n_heads']} heads, d_mlp {c['d_mlp']}, context {c['n_ctx']}) and a byte-level BPE of {c['vocabulary']:,} "
        "tokens. Made by `scripts/training/train_tiny_lm.py`; `training.json` holds its configuration, history and "
        "figures, `digests.json` the sha256 of each file.",
        f"**Data.** The training side of `husai.subjects.text.FAMILIES`: {record['documents']:,} documents, "
        f"{record['distinct_tokens']:,} tokens, read from the sae-probes package (digest "
        f"`{record['data_digest'][:16]}`). No text of a probe or out-of-distribution data set is among them. "
        f"{record['history'][-1]['tokens']:,} tokens were seen, {c['tokens'] / record['distinct_tokens']:.1f} passes.",
        f"**Bits per byte** on {figures['documents']:,} held-out documents ({figures['bytes']:,} bytes), beside "
        "interpolated Witten–Bell n-grams of the same tokens:",
        "\n".join(table),
        f"Bars: {held}.",
        "**Use.** `--subject husai-tiny` or `--model-name husai-tiny`. Every input begins with `<|endoftext|>`, which "
        "the tokenizer puts there. The model is a subject for interpretability research and of no other use: it knows "
        "little, and says false and offensive things, as its training text (news, reviews, forum posts, essays, "
        "papers) does.",
    ]
    return (
        "\n\n".join(p if p.startswith("|") else textwrap.fill(p, 120, break_on_hyphens=False) for p in paragraphs)
        + "\n"
    )
