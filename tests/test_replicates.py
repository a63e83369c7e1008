"""SAEs that differ in their seed alone: judged by the files that the libraries write, and by figures where they write
none. The files have the layout and the keys of sae-lens 6.54, dictionary-learning 0.1 and eai-sparsify 1.3."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from husai.dictionaries import foreign, recipes
from husai.evals import loaded
from husai.evidence import rules
from husai.evidence.schemas import Heldout
from husai.runs.errors import BadInput
from husai.stability import replicates

D_IN, D_SAE = 8, 12


def weights(seed):
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g))
    W_enc = torch.randn(D_IN, D_SAE, generator=g)
    return {"W_enc": W_enc, "b_enc": torch.zeros(D_SAE), "W_dec": W_dec, "b_dec": torch.zeros(D_IN)}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def saelens(root, seed, l1=5.0, lr=3e-4, architecture="standard", runner=True, **more):
    folder, w = root / f"run{seed}", weights(seed)
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": True}
    config |= {"normalize_activations": "none", "reshape_activations": "none", "metadata": {"model_name": "gpt2"}}
    write_json(folder / "cfg.json", config)
    save_file(w, folder / "sae_weights.safetensors")
    if runner:
        run = {"sae": {"l1_coefficient": l1, "d_sae": D_SAE}, "lr": lr, "seed": 42, "training_tokens": 1000}
        run |= {"logger": {"wandb_id": f"id{seed}", "run_name": f"{seed}-L1-{l1}"}, "output_path": f"out/{seed}"}
        run |= {"checkpoint_path": f"checkpoints/{seed}", "n_checkpoints": seed, "device": f"cuda:{seed}"}
        write_json(folder / "runner_cfg.json", run | more)
    return folder


def dictionary_learning(root, seed, k=4, dict_class="AutoEncoderTopK", told_seed=None, **more):
    folder, w = root / f"trainer_{seed}", weights(seed)
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    state |= {"b_dec": w["b_dec"], "k": torch.tensor(k)}
    if dict_class == "BatchTopKSAE":
        state["threshold"] = torch.tensor(0.1)
    trainer = {"trainer_class": "Trainer", "dict_class": dict_class, "lr": 1e-3, "steps": 100, "k": k, "layer": 1}
    trainer |= {"seed": seed if told_seed is None else told_seed, "activation_dim": D_IN, "dict_size": D_SAE}
    trainer |= {"device": "cuda:0", "lm_name": "gpt2", "wandb_name": f"Trainer_{seed}"} | more
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"d_submodule": D_IN, "ctx_len": 128}})
    torch.save(state, folder / "ae.pt")
    return folder


def sparsify(root, seed, k=4, layer=1, told_seed=None, **more):
    run, w = root / f"run_seed{seed}", weights(10 * seed + layer)
    folder = run / f"layers.{layer}"
    sae = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": k}
    sae |= {"multi_topk": False, "skip_connection": False, "transcode": False}
    write_json(folder / "cfg.json", sae | {"d_in": D_IN})
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae.safetensors")
    told = seed if told_seed is None else told_seed
    config = {"sae": sae, "lr": 1e-3, "optimizer": "signum", "init_seeds": [told], "run_name": f"s{seed}"}
    write_json(run / "config.json", config | {"save_dir": f"out{seed}", "log_to_wandb": False, "finetune": None} | more)
    return folder


def check(folders, heldout=()):
    return replicates.check("--checkpoint", folders, [foreign.open_checkpoint(f) for f in folders], heldout)


def figures(l0, ev):
    return [Heldout(explained_variance=e, mse=1.0, l0=n, dead_share=0.0) for n, e in zip(l0, ev, strict=True)]


@pytest.mark.parametrize("library", [saelens, dictionary_learning, sparsify])
def test_seeds_of_one_training_are_accepted_without_a_word(library, tmp_path):
    folders = [library(tmp_path, seed) for seed in (1, 2, 3)]
    assert check(folders, figures([4.0, 4.1, 4.2], [0.7, 0.71, 0.72])) == []


@pytest.mark.parametrize(
    ("library", "changes", "named"),
    [
        (saelens, [{}, {}, {"l1": 9.0}], ["l1_coefficient", "5.0", "9.0"]),
        (saelens, [{}, {}, {"lr": 1e-5}], ["lr", "0.0003", "1e-05"]),
        (saelens, [{}, {}, {"training_tokens": 7}], ["training_tokens", "1000", "7"]),
        (dictionary_learning, [{}, {}, {"k": 8}], ["k", "4", "8"]),
        (dictionary_learning, [{}, {}, {"steps": 7}], ["steps", "100", "7"]),
        (dictionary_learning, [{"dict_class": "BatchTopKSAE"}, {}, {}], ["architecture", "jumprelu", "topk"]),
        (sparsify, [{}, {}, {"k": 8}], ["k", "4", "8"]),
        (sparsify, [{}, {}, {"layer": 0}], ["hook_name"]),
        (sparsify, [{}, {}, {"optimizer": "adam"}], ["optimizer", "'signum'", "'adam'"]),
        (sparsify, [{}, {}, {"auxk_alpha": 0.1}], ["auxk_alpha", "not said", "0.1"]),
    ],
)
def test_other_conditions_are_refused_with_the_key_and_its_values(library, changes, named, tmp_path):
    folders = [library(tmp_path, seed, **change) for seed, change in enumerate(changes)]
    with pytest.raises(BadInput, match=r"^--checkpoint: ") as refused:
        check(folders)
    other = folders[2] if not changes[0] else folders[1]
    assert all(text in str(refused.value) for text in [str(folders[0]), str(other), *named])


def test_jumprelu_and_batchtopk_are_two_conditions(tmp_path):
    """Both are read as jumprelu."""
    folders = [dictionary_learning(tmp_path, seed, dict_class="BatchTopKSAE") for seed in (1, 2)]
    other = dictionary_learning(tmp_path, 3)
    w = weights(3) | {"threshold": torch.full((D_SAE,), 0.1)}
    torch.save(w, other / "ae.pt")
    config = json.loads((folders[0] / "config.json").read_text())
    config["trainer"] |= {"dict_class": "JumpReluAutoEncoder", "seed": 3}
    del config["trainer"]["k"]
    write_json(other / "config.json", config)
    with pytest.raises(BadInput, match=r"^--checkpoint: .*JumpReluAutoEncoder|subtract_b_dec"):
        check([*folders, other])


@pytest.mark.parametrize("library", [dictionary_learning, sparsify])
def test_one_seed_of_the_initialisation_is_refused(library, tmp_path):
    folders = [library(tmp_path, seed, told_seed=7) for seed in (1, 2, 3)]
    with pytest.raises(BadInput, match=r"^--checkpoint: .*share their initialisation.*7"):
        check(folders)


def test_one_checkpoint_to_begin_with_is_refused(tmp_path):
    folders = [sparsify(tmp_path, seed, finetune="somewhere/sae") for seed in (1, 2, 3)]
    with pytest.raises(BadInput, match=r"^--checkpoint: .*share their initialisation.*somewhere/sae"):
        check(folders)


def test_where_files_say_nothing_figures_judge(tmp_path):
    folders = [saelens(tmp_path, seed, runner=False) for seed in (1, 2, 3)]
    (silent,) = check(folders)
    assert str(folders[0]) in silent
    assert len(check(folders, figures([10, 10.5, 11.5], [0.65, 0.66, 0.64]))) == 2
    for l0, ev in (([110, 42, 18], [0.65, 0.66, 0.64]), ([10, 10, 10], [0.656, 0.009, 0.66])):
        with pytest.raises(BadInput, match=r"^--checkpoint: .*run1"):
            check(folders, figures(l0, ev))


def test_where_files_agree_figures_that_lie_apart_are_said(tmp_path):
    """A seed that fails belongs to its condition: leaving it out would select."""
    folders = [saelens(tmp_path, seed) for seed in (1, 2, 3)]
    (said,) = check(folders, figures([10, 10, 10], [0.656, 0.009, 0.66]))
    assert "0.009" in said
    (said,) = check(folders, figures([110, 42, 18], [0.65, 0.65, 0.65]))
    assert "18" in said
    assert "110" in said


@given(values=st.lists(st.floats(1, 100), min_size=3, max_size=7), factor=st.floats(0.01, 100))
def test_figures_lie_apart_whatever_their_order_and_l0s_unit(values, factor):
    ev = [0.5] * len(values)
    apart = bool(rules.far_apart(values, ev, 0.1, 0.1))
    assert apart == bool(rules.far_apart(values[::-1], ev, 0.1, 0.1))
    middle = sorted(values)[len(values) // 2] if len(values) % 2 else None
    if middle:
        edge = (max(values) - min(values)) / middle
        if abs(edge - 0.1) > 1e-9:
            assert apart == (edge > 0.1)
            assert apart == bool(rules.far_apart([v * factor for v in values], ev, 0.1, 0.1))


def test_seeds_differ_in_no_setting_that_changes_training():
    for key in ("sae.k", "lr", "sae.l1_coefficient", "trainer.steps", "buffer.ctx_len", "dataset_path", "dtype"):
        assert not recipes.may_differ(key)
    for key in ("seed", "trainer.seed", "logger.run_name", "wandb_project", "output_path", "trainer.device"):
        assert recipes.may_differ(key)


def test_saes_are_called_by_their_folders(tmp_path):
    folders = [sparsify(tmp_path / "mine", seed) for seed in (1, 2)]
    names = loaded.user_names(folders)
    assert [*names.values()] == ["run_seed1/layers.1", "run_seed2/layers.1"]
    assert [*loaded.user_names([folders[0] / "sae.safetensors"]).values()] == ["layers.1"]
    file = tmp_path / "mine" / "ae_7.pt"
    file.write_bytes(b"")
    assert loaded.user_names([*folders, file])[file] == "ae_7.pt"
