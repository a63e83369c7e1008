"""A language model of 16 coordinates that has learned nothing, and a few short texts: what tests take in place of what
is real, so that they take seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from husai.subjects import text, tiny_lm
from husai.subjects.tiny_lm import TinyLMConfig


def few_texts() -> text.Corpus:
    """A corpus of short messages of the training side."""
    short = text.documents("86_social_iqa")
    return text.Corpus(train=short[:600], heldout=short[600:800], heldout_families=["a"] * 200, dropped=0)


def config(n_layers: int = 2, d_model: int = 16) -> TinyLMConfig:
    return TinyLMConfig(vocabulary=400, n_layers=n_layers, d_model=d_model, n_heads=2, d_mlp=32, n_ctx=32)


@contextmanager
def few_documents() -> Iterator[text.Corpus]:
    """The packaged text is `few_texts` meanwhile."""
    corpus = few_texts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "corpus", lambda: corpus)
        yield corpus


def save_structured(folder: Path, documents: list[str]) -> Path:
    """A subject with something to find: each token stands for one of 24 directions in 32 dimensions."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 32, generator=g), dim=1)
    return save_miniature(folder, documents, tokens=directions[torch.randint(24, (400,), generator=g)])


def save_miniature(folder: Path, documents: list[str], n_layers: int = 2, tokens: torch.Tensor | None = None) -> Path:
    """Its Hugging Face folder, whose tokenizer comes of the documents.

    Args:
        tokens: `[vocabulary, d_model]`, its embedding, which its blocks hardly change; 16 coordinates without it.
    """
    torch.manual_seed(0)
    sizes = config(n_layers, 16 if tokens is None else tokens.shape[1])
    model = tiny_lm.build_model(sizes)
    if tokens is not None:
        with torch.no_grad():
            (embedding,) = (p for name, p in model.named_parameters() if name.endswith("embed_in.weight"))
            embedding.copy_(tokens[: len(embedding)])
    folder.mkdir(parents=True)
    tiny_lm.save_folder(model, tiny_lm.train_tokenizer(documents, 400), sizes, folder)
    return folder
