"""Tiny imitations of the repositories that SAELens' catalogue names, one kind a loader, for a local hub cache.

Each writes the files that SAELens' loader asks for, in the layout and under the names of the real repository. Sizes
are small; the catalogue's own overrides of a configuration tell them to SAELens.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save as to_bytes
from torch import Tensor

D_IN, D_SAE, K = 8, 16, 3
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Imitation:
    """An SAE of the catalogue, whose repository is imitated."""

    loader: str
    release: str
    sae_id: str
    write: object
    """path in the repository -> its files."""
    overrides: tuple = ()
    """Further overrides of the configuration."""

    @property
    def name(self) -> Path:
        return Path(f"sae-lens:{self.release}/{self.sae_id}")


def put(cache: Path, repo: str, files: Files) -> Path:
    """Files of a repository in a hub cache, as the hub's client lays them out; the snapshot's folder."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir(exist_ok=True)
    snapshot = folder / "snapshots" / COMMIT
    for name, content in files.items():
        blob = folder / "blobs" / name.replace("/", "--")
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


def draw(*names: str) -> dict[str, Tensor]:
    """Tensors in SAELens' names and shapes, drawn alike at each call. No decoder row has norm 1."""
    shapes = dict.fromkeys(("b_enc", "b_gate", "b_mag", "r_mag", "threshold"), (D_SAE,))
    shapes |= {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), "W_skip": (D_IN, D_IN)}
    g = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=g) * 0.5 for name, shape in sorted(shapes.items())}
    drawn["threshold"] = drawn["threshold"].abs()
    return {name: drawn[name] for name in names}


STANDARD = ("W_enc", "b_enc", "W_dec", "b_dec")
JUMPRELU, GATED = (*STANDARD, "threshold"), ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")


def tensors(state: dict[str, Tensor]) -> bytes:
    return to_bytes({name: tensor.contiguous() for name, tensor in state.items()})


def pickled(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def archived(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    return file.getvalue()


def text(value) -> bytes:
    return json.dumps(value).encode()


# ---------------------------------------------------------------------------------------------------------------------
# One function a loader: path -> files


def sae_lens(architecture="standard", names=STANDARD, version=None, **more):
    """`version` None: a `cfg.json` from before SAELens 6, whose keys are those of the whole run."""
    hook = more.pop("hook", "blocks.1.hook_resid_pre")
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cuda", "architecture": architecture}
    if version is None:
        config |= {"model_name": "gpt2-small", "hook_point": hook, "hook_point_layer": 1, "context_size": 128}
        config |= {"hook_point_head_index": None, "prepend_bos": True, "lp_norm": 1, "checkpoint_path": "x", "l1": 2}
    else:
        config |= {"metadata": {"sae_lens_version": version, "hook_name": hook, "model_name": "gpt2-small"}}
    config |= more

    def write(path: str) -> Files:
        return {
            f"{path}/cfg.json": text(config),
            f"{path}/sae_weights.safetensors": tensors(draw(*names)),
            f"{path}/sparsity.safetensors": tensors({"sparsity": torch.zeros(D_SAE)}),
        }

    return write


def connor_rob(path: str) -> Files:
    config = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.0.attn.hook_z"}
    return {path: pickled(draw(*STANDARD)), f"{path.split('.pt')[0]}_cfg.json": text(config)}


def gemma_2(path: str) -> Files:
    return {f"{path}/params.npz": archived(draw(*JUMPRELU))}


def gemma_3(path: str, affine: bool = False) -> Files:
    state = {f"{n.lower()}": t for n, t in draw(*JUMPRELU).items()}
    if affine:
        state["affine_skip_connection"] = draw("W_skip")["W_skip"]
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": affine}
    return {f"{path}/params.safetensors": tensors(state), f"{path}/config.json": text(config)}


def gemma_3_across_layers(path: str) -> Files:
    """A layer of a cross-layer transcoder: it writes to three layers."""
    state = {f"{n.lower()}": t for n, t in draw(*JUMPRELU).items()}
    state["w_dec"] = torch.stack([state["w_dec"], 2 * state["w_dec"], -state["w_dec"].flip(0)], dim=1)
    return {f"{path}.safetensors": tensors(state)}


def llama_scope(path: str) -> Files:
    w = draw(*STANDARD)
    config = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": "blocks.0.hook_resid_post"}
    config |= {"jump_relu_threshold": 0.4, "dataset_average_activation_norm": {"in": 2.5}}
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    state |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    return {f"{path}/hyperparams.json": text(config), f"{path}/checkpoints/final.safetensors": tensors(state)}


def llama_scope_r1_distill(path: str) -> Files:
    w = draw(*JUMPRELU)
    config = {"d_model": D_IN, "expansion_factor": D_SAE // D_IN, "hook_point_in": "blocks.0.hook_resid_post"}
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    state |= {"decoder.bias": w["b_dec"], "log_jumprelu_threshold": w["threshold"].log()}
    return {f"{path}/config.json": text(config), f"{path}/sae_weights.safetensors": tensors(state)}


def dictionary_learning(kind: str):
    w = draw("W_enc", "W_dec", "b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "threshold")
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    one = torch.tensor(0.4)
    state = {
        "AutoEncoder": linear | {"bias": w["b_dec"]},
        "AutoEncoderTopK": linear | {"b_dec": w["b_dec"], "k": torch.tensor(K), "threshold": one},
        "BatchTopKSAE": linear | {"b_dec": w["b_dec"], "k": torch.tensor(K), "threshold": one},
        "MatryoshkaBatchTopKSAE": {n: w[n] for n in STANDARD} | {"threshold": one},
        "JumpReluAutoEncoder": {n: w[n] for n in JUMPRELU},
        "GatedAutoEncoder": {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
        | {"decoder_bias": w["b_dec"], "gate_bias": w["b_gate"], "mag_bias": w["b_mag"], "r_mag": w["r_mag"]},
    }[kind]
    trainer = {"dict_class": kind, "layer": 1, "k": K, "activation_dim": D_IN, "dict_size": D_SAE}
    config = {"trainer": trainer | {"lm_name": "EleutherAI/pythia-70m-deduped"}, "buffer": {"ctx_len": 128}}
    return lambda path: {f"{path}/ae.pt": pickled(state), f"{path}/config.json": text(config)}


def deepseek_r1(path: str) -> Files:
    w = draw(*STANDARD)
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    return {path: pickled(state | {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]})}


def goodfire(path: str) -> Files:
    w = draw(*STANDARD)
    state = {"encoder_linear.weight": w["W_enc"].T, "encoder_linear.bias": w["b_enc"]}
    return {path: pickled(state | {"decoder_linear.weight": w["W_dec"].T, "decoder_linear.bias": w["b_dec"]})}


def qwen_scope(path: str) -> Files:
    w = draw(*STANDARD)
    return {path: pickled(w | {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T})}


def mwhanna(path: str) -> Files:
    w = draw(*STANDARD)
    wandb = {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 4096}}
    return {
        path: tensors(w | {"W_enc": w["W_enc"].T}),
        "wandb-config.yaml": yaml.dump(wandb).encode(),
        "config.yaml": yaml.dump({"model_name": "Qwen/Qwen3-4B"}).encode(),
    }


def mntss(path: str) -> Files:
    w = draw(*STANDARD)
    config = {"model_name": "google/gemma-2-2b"}
    config |= {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    encoder = {f"W_enc_{path}": w["W_enc"].T, f"b_enc_{path}": w["b_enc"], f"b_dec_{path}": w["b_dec"]}
    decoder = {f"W_dec_{path}": torch.stack([w["W_dec"], w["W_dec"].flip(0)], dim=1)}
    return {
        "config.yaml": yaml.dump(config).encode(),
        f"W_enc_{path}.safetensors": tensors(encoder),
        f"W_dec_{path}.safetensors": tensors(decoder),
    }


def temporal(path: str) -> Files:
    sae = {"exp_factor": D_SAE / D_IN, "n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 2, "kval_topk": K}
    sae |= {"sae_diff_type": "topk", "tied_weights": True, "scaling_factor": 0.5}
    config = {"llm": {"dimin": D_IN}, "sae": sae, "data": {"dtype": "float32"}}
    w, state = draw("W_dec", "b_dec"), {}
    for layer, (rows, columns) in {
        "k_ctx": (8, 16),
        "q_target": (8, 16),
        "v_ctx": (16, 16),
        "c_proj": (16, 16),
    }.items():
        state[f"attn_layers.0.{layer}.weight"] = torch.ones(rows, columns) / 16
        state[f"attn_layers.0.{layer}.bias"] = torch.zeros(rows)
    state |= {"D": w["W_dec"], "b": w["b_dec"]}
    return {f"{path}/conf.yaml": yaml.dump(config).encode(), f"{path}/latest_ckpt.safetensors": tensors(state)}


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue's SAEs that are imitated

OAI = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": "layer_norm"}
SIZES = (("d_in", D_IN), ("d_sae", D_SAE))
LEARNED = "sae_bench_pythia70m_sweep_{}_ctx128_0730"

IMITATIONS = [
    Imitation("sae_lens", "gpt2-small-res-jb", "blocks.8.hook_resid_pre", sae_lens()),
    Imitation("sae_lens", "gpt2-small-resid-post-v5-32k", "blocks.3.hook_resid_post", sae_lens(**OAI)),
    Imitation("sae_lens", "mistral-7b-res-wg", "blocks.8.hook_resid_pre", sae_lens()),
    Imitation(
        "sae_lens",
        "gpt2-small-mlp-tm",
        "blocks.0.hook_mlp_out",
        sae_lens(normalize_activations="expected_average_only_in"),
    ),
    Imitation(
        "sae_lens",
        "gemma-2-2b-res-matryoshka-dc",
        "blocks.0.hook_resid_post",
        sae_lens("jumprelu", JUMPRELU, "6.0.0", normalize_activations="none"),
    ),
    Imitation("sae_lens", "llama-3-8b-it-res-jh", "blocks.25.hook_resid_post", sae_lens("gated", GATED)),
    Imitation("connor_rob_hook_z", "gpt2-small-hook-z-kk", "blocks.0.hook_z", connor_rob),
    Imitation("gemma_2", "gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical", gemma_2, SIZES),
    Imitation("gemma_2", "gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_104", gemma_2, SIZES),
    Imitation("gemma_2", "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", gemma_2, SIZES),
    Imitation("gemma_3", "gemma-scope-2-1b-pt-res", "layer_13_width_16k_l0_big", gemma_3),
    Imitation("gemma_3", "gemma-scope-2-1b-pt-att", "layer_13_width_16k_l0_big", gemma_3),
    Imitation(
        "gemma_3",
        "gemma-scope-2-270m-pt-transcoders",
        "transcoder/layer_15_width_262k_l0_big_affine",
        lambda path: gemma_3(path, affine=True),
    ),
    Imitation("gemma_3", "gemma-scope-2-1b-pt-transcoders", "transcoder/layer_13_width_16k_l0_big", gemma_3),
    Imitation("llama_scope", "llama_scope_lxr_8x", "l0r_8x", llama_scope),
    Imitation("llama_scope_r1_distill", "llama_scope_r1_distill", "l0r_800m_slimpajama", llama_scope_r1_distill),
    *(
        Imitation("dictionary_learning_1", LEARNED.format(sweep), f"blocks.3.hook_resid_post__trainer_{n}", kind)
        for sweep, n, kind in (
            ("topk", 0, dictionary_learning("AutoEncoderTopK")),
            ("topk", 1, dictionary_learning("BatchTopKSAE")),
            ("topk", 2, dictionary_learning("MatryoshkaBatchTopKSAE")),
            ("topk", 3, dictionary_learning("JumpReluAutoEncoder")),
            ("gated", 0, dictionary_learning("GatedAutoEncoder")),
            ("panneal", 16, dictionary_learning("AutoEncoder")),
        )
    ),
    Imitation("deepseek_r1", "deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post", deepseek_r1, SIZES),
    Imitation(
        "qwen_scope",
        "qwen-scope-3-1.7b-base-w32k-l50",
        "layer0",
        qwen_scope,
        (*SIZES, ("activation_fn_kwargs", {"k": K})),
    ),
    Imitation("goodfire", "goodfire-llama-3.3-70b-instruct", "layer_50", goodfire, SIZES),
    Imitation("goodfire", "goodfire-llama-3.1-8b-instruct", "layer_19", goodfire, SIZES),
    Imitation(
        "gemma_2_transcoder",
        "gemma-scope-2b-pt-transcoders",
        "layer_0/width_16k/average_l0_76",
        gemma_2,
        (*SIZES, ("d_out", D_IN)),
    ),
    Imitation("mwhanna_transcoder", "mwhanna-qwen3-4b-transcoders", "layer_0", mwhanna),
    Imitation("mntss_clt_layer_transcoder", "mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_0", mntss),
    Imitation("temporal", "temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", temporal),
]
