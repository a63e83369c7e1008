"""Five SAEs, trained by another library's own code on a small language model, go through the release check. Its figures
are those of the library's own encode and decode."""

import json
import os
import shutil

import pytest
import torch

from conftest import ROOT
from husai.activations.store import ActivationStore
from husai.dictionaries import foreign
from miniature import few_texts, save_miniature

CHECK = "scripts/experiments/run_release_check.py"
FEATURES = "scripts/experiments/run_feature_reliability.py"
CONTROL = ROOT / "docs" / "evidence" / "embedded_queue" / "phase4a_trained_vs_random" / "results.json"
INSTALL = "pip install --no-deps -r requirements-bench.txt"
D_IN, D_SAE, K, SEEDS, CONTEXT = 16, 24, 3, (1, 2, 3, 4, 5), 32
MODULE, HOOK = "gpt_neox.layers.0", "blocks.1.hook_resid_pre"
"""One place, as the libraries and as HUSAI call it."""
os.environ |= {"SPARSIFY_DISABLE_TRITON": "1", "WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def corpus():
    few = few_texts()
    return [f"{i}: {t}" for i, t in enumerate((few.train + few.heldout) * 3)]


@pytest.fixture(scope="module")
def subject(corpus, tmp_path_factory):
    folder = save_miniature(tmp_path_factory.mktemp("subject") / "miniature", corpus[:600])
    return folder


def by_sae_lens(subject, corpus, root):
    """SAELens 6: the whole runner; RUN/output and RUN/checkpoints/<id>/<steps> of each seed."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    for seed in SEEDS:
        sae = TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, normalize_activations="expected_average_only_in")
        config = LanguageModelSAERunnerConfig(
            sae=sae,
            model_name=str(subject),
            model_class_name="AutoModelForCausalLM",
            hook_name=MODULE,
            dataset_path="own",
            is_dataset_tokenized=False,
            context_size=CONTEXT,
            training_tokens=20_480,
            train_batch_size_tokens=512,
            n_batches_in_buffer=64,
            store_batch_size_prompts=8,
            n_batches_for_norm_estimate=10,
            n_checkpoints=1,
            save_final_checkpoint=True,
            checkpoint_path=str(root / f"seed{seed}" / "checkpoints"),
            output_path=str(root / f"seed{seed}" / "output"),
            lr=3e-3,
            seed=seed,
            logger=LoggingConfig(log_to_wandb=False),
            verbose=False,
        )
        torch.manual_seed(seed)
        LanguageModelSAETrainingRunner(config, override_dataset=Dataset.from_dict({"text": corpus})).run()


def sae_lens_opens(path):
    """Reconstruction by SAELens, of a checkpoint with the scale that its training keeps beside it."""
    from sae_lens import SAE, TrainingSAE

    scaler = path / "activation_scaler.json"
    factor = (json.loads(scaler.read_text())["scaling_factor"] if scaler.is_file() else None) or 1.0  # None: folded
    sae = (TrainingSAE if scaler.is_file() else SAE).load_from_disk(path)

    def run(x):
        features = sae.encode(x * factor)
        return features, sae.decode(features) / factor

    return run


def rows_of(subject, corpus):
    """Batches of activations, without end, of the module's output in transformers' own model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(subject).eval(), AutoTokenizer.from_pretrained(subject)
    ids = [tokenizer(text, truncation=True, max_length=CONTEXT)["input_ids"] for text in corpus[:800]]
    with torch.no_grad():
        rows = torch.cat([model(torch.tensor([i]), output_hidden_states=True).hidden_states[1][0, 1:] for i in ids])
    g = torch.Generator().manual_seed(0)
    while True:
        yield rows[torch.randint(len(rows), (512,), generator=g)]


def by_dictionary_learning(subject, corpus, root):
    """dictionary_learning: `trainSAE`; RUN/trainer_0/ae.pt and checkpoints/ae_<step>.pt of each seed."""
    pytest.importorskip("dictionary_learning", reason=INSTALL)
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    about = {"activation_dim": D_IN, "dict_size": D_SAE, "k": K, "lr": 3e-3, "steps": 60, "device": "cpu"}
    about |= {"layer": 0, "lm_name": str(subject), "submodule_name": "resid_post_layer_0", "warmup_steps": 5}
    rows = rows_of(subject, corpus)
    for seed in SEEDS:
        trainer = about | {"trainer": TopKTrainer, "dict_class": AutoEncoderTopK, "seed": seed, "wandb_name": "own"}
        save = {"save_dir": str(root / f"seed{seed}"), "save_steps": [0, 30]}
        trainSAE(rows, [trainer], steps=60, device="cpu", **save)


def dictionary_learning_opens(path):
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(path.parent if path.is_file() else path), device="cpu")
    return lambda x: (sae.encode(x), sae(x))


def by_sparsify(subject, corpus, root):
    """sparsify: `Trainer.fit`; RUN/layers.0 of each seed."""
    pytest.importorskip("sparsify", reason=INSTALL)
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from sparsify.data import chunk_and_tokenize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(subject)
    texts = Dataset.from_dict({"text": corpus[:1000]})
    tokens = chunk_and_tokenize(texts, tokenizer, max_seq_len=CONTEXT, num_proc=1)
    for seed in SEEDS:
        config = TrainConfig(
            SparseCoderConfig(num_latents=D_SAE, k=K),
            batch_size=16,
            optimizer="adam",
            lr=3e-3,
            lr_warmup_steps=5,
            hookpoints=["layers.0"],
            init_seeds=[seed],
            log_to_wandb=False,
            save_dir=str(root),
            run_name=f"seed{seed}",
        )
        Trainer(config, tokens, AutoModelForCausalLM.from_pretrained(subject)).fit()


def sparsify_opens(path):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(path)

    def run(x):
        acts, indices, _ = sae.encode(x)
        return torch.zeros(len(x), D_SAE).scatter(1, indices, acts), sae.decode(acts, indices)

    return run


LIBRARIES = {
    "sae_lens": (by_sae_lens, sae_lens_opens),
    "dictionary_learning": (by_dictionary_learning, dictionary_learning_opens),
    "sparsify": (by_sparsify, sparsify_opens),
}


@pytest.fixture(scope="module")
def trained(subject, corpus, tmp_path_factory):
    """`trained(library)` -> folder of its five trainings."""
    made = {}

    def train(library):
        if library not in made:
            made[library] = tmp_path_factory.mktemp(library)
            LIBRARIES[library][0](subject, corpus, made[library])
        return made[library]

    return train


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of the libraries' own code
@pytest.mark.parametrize("library", ["sae_lens", "sae_lens checkpoints", "dictionary_learning", "sparsify"])
def test_five_saes_of_a_library_go_through_the_release_check(library, trained, subject, corpus, run_script, tmp_path):
    name, _, part = library.partition(" ")
    saes = trained(name)
    if part:  # the trainings alone, without what they put out at the end
        saes = shutil.copytree(saes, tmp_path / "saes", ignore=shutil.ignore_patterns("output"))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in corpus))
    where = ["--model-name", subject, "--hook-name", MODULE, "--text", text, "--artifact-root", tmp_path / "root"]
    sizes = ["--rows", 1000, "--null-draws", 100, "--max-rows", 24, "--contexts", 4, "--threads", 1]
    sizes += ["--dataset-names", "96_spam_is", "--phase4a-results", CONTROL, "--output-dir", tmp_path / "check"]
    code, out, err = run_script(CHECK, "--checkpoint", saes, *where, *sizes)
    assert code == 0, out + err[-3000:]
    found = json.loads((tmp_path / "check" / "results.json").read_text())
    assert len(found["names"]) == 5
    assert found["candidate"]["facts"]["hook_name"] == "blocks.0.hook_resid_post"
    assert found["decision"]["outcome"] == "not passed"
    assert (tmp_path / "check" / "report.html").is_file()

    confirmed = json.loads((tmp_path / "check/parts/candidate_confirmation/results.json").read_text())
    digest = confirmed["inputs"]["held-out activations"]
    stores = map(ActivationStore.open, [p.parent for p in (tmp_path / "root/activations").glob("*/manifest.json")])
    store = next(s for s in stores if s.digest == digest)
    x = store.read(0, store.rows)
    centred = (x.double() - x.double().mean(0)).square().sum()
    records = {r["checkpoint_sha256"]: r["heldout"] for r in confirmed["bank"]["saes"]}
    chosen = foreign.find_all([saes], "--checkpoint", HOOK)
    assert len(chosen) == 5
    for path in chosen:
        with torch.no_grad():
            features, back = LIBRARIES[name][1](path)(x)
        heldout = records[foreign.checkpoint_sha256(path)]
        assert heldout["explained_variance"] == pytest.approx(
            (1 - (x.double() - back.double()).square().sum() / centred).item(), abs=1e-5
        )
        assert heldout["l0"] == pytest.approx((features > 0).sum(1).double().mean().item(), abs=1e-5)
        assert heldout["dead_share"] == pytest.approx((features > 0).any(0).logical_not().double().mean().item())
        assert heldout["explained_variance"] > 0.1, "it has learned something"


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # of the libraries' own code
@pytest.mark.parametrize("library", LIBRARIES)
def test_one_sae_of_a_library_gets_a_feature_table(library, trained, subject, corpus, run_script, tmp_path):
    """Siblings at its width and L0 are trained here; the page stands beside the table."""
    first = sorted(foreign.find_all([trained(library)], "--checkpoint", HOOK))[0]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in corpus))
    where = ["--model-name", subject, "--hook-name", MODULE, "--text", text, "--artifact-root", tmp_path / "root"]
    sizes = ["--rows", 1000, "--siblings", 5, "--tokens", 20_480, "--contexts", 6, "--threads", 1]
    code, out, err = run_script(FEATURES, "--checkpoint", first, *where, *sizes, "--output-dir", tmp_path / "out")
    assert code == 0, out + err[-3000:]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["training"]["d_sae"] == D_SAE
    assert found["sae"]["heldout"]["explained_variance"] > 0.1
    for sibling in found["siblings"]:
        assert sibling["heldout"]["l0"] == pytest.approx(found["sae"]["heldout"]["l0"], rel=0.1)
    assert len((tmp_path / "out" / "features.csv").read_text().splitlines()) == D_SAE + 1
    assert (tmp_path / "out" / "report.html").is_file()
