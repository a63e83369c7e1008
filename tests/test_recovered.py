"""Cross-entropy with SAEs spliced in: one pass for all of them equals the bridge's passes, on several architectures."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from husai.dictionaries.sae import SAE
from husai.runs.errors import BadInput
from husai.subjects import pretrained
from husai.training import recovered
from husai.training.recovered import cross_entropies
from miniature import few_texts, save_miniature

ARCHITECTURES = {  # what differs: where normalisation stands, position embeddings, caps on logits, masks of their own
    "gpt_neox": {"use_parallel_residual": False},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "llama": {"num_key_value_heads": 1},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 6},
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
HOOKS = (
    *("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.0.hook_attn_out"),
    *("blocks.1.mlp.hook_in", "hook_embed"),
)


@pytest.fixture(scope="module")
def texts():
    return few_texts().heldout[:4]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request, tmp_path_factory):
    """A random model of the architecture with the miniature's tokenizer."""
    folder = save_miniature(tmp_path_factory.mktemp("subjects") / request.param, few_texts().train)
    settings = {"vocab_size": 400, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}
    settings |= SIZES | ARCHITECTURES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, pad_token_id=0, **settings))
    for p in model.parameters():
        p.data.mul_(4)  # away from a uniform prediction
    for name in ("model.safetensors", "config.json", "digests.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    model.save_pretrained(folder)
    return pretrained.load(str(folder))


def random_sae(seed: int) -> SAE:
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=1)
    return SAE({"W_enc": W.T.contiguous(), "b_enc": torch.zeros(24), "W_dec": W, "b_dec": torch.ones(16)}, "topk", 4)


@torch.inference_mode()
def by_the_bridge(subject, hook_name, saes, texts) -> dict:
    """A pass of the whole model a text and SAE, through the bridge's hooks."""
    n = 1 + len(saes)
    total = {"model": 0.0, "changed": np.zeros(n), "kl_changed": np.zeros(n), "tokens": 0}
    for ids in subject.tokenizer(texts, truncation=True, max_length=subject.n_ctx)["input_ids"]:
        tokens = torch.tensor([ids])

        def predict(replace, tokens=tokens):
            def splice(x, hook):
                return torch.cat([x[:, :1], replace(x[0, 1:])[None]], 1)

            hooks = [] if replace is None else [(hook_name, splice)]
            return subject.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, 1:-1].double().log_softmax(-1)

        whole, truth = predict(None), tokens[0, 2:, None]
        replacements = [recovered.Replacement(subject, hook_name, sae) for sae in (None, *saes)]
        total["model"] -= whole.gather(1, truth).sum().item()
        total["tokens"] += len(truth)
        for i, replace in enumerate(replacements):
            changed = predict(replace)
            total["changed"][i] -= changed.gather(1, truth).sum().item()
            total["kl_changed"][i] += (whole.exp() * (whole - changed)).sum().item()
    (zeroed, *spliced), (kl_zeroed, *kl) = (total[name] / total["tokens"] for name in ("changed", "kl_changed"))
    found = {"model": total["model"] / total["tokens"], "zeroed": zeroed, "spliced": spliced, "kl_zeroed": kl_zeroed}
    return found | {"kl_spliced": kl, "tokens": total["tokens"]}


@pytest.mark.parametrize("hook_name", HOOKS)
def test_one_pass_for_all_equals_the_bridge(subject, texts, hook_name, monkeypatch):
    flat = type(subject.transformer).__name__ == "OPTForCausalLM" and "mlp" in hook_name
    if hook_name not in subject.model.hook_dict or flat:
        pytest.skip("the architecture has no such activation [batch, position, d_in]")
    saes = [random_sae(seed) for seed in range(3)]
    expected = by_the_bridge(subject, hook_name, saes, texts)
    monkeypatch.setattr(recovered, "LAYER_ROWS", 32 * 3)  # two copies beside the unchanged one
    monkeypatch.setattr(recovered, "LOGIT_ROWS", 50)
    losses = cross_entropies(subject, hook_name, saes, texts)
    assert losses["tokens"] == expected["tokens"]
    for name in ("model", "zeroed", "spliced", "kl_zeroed", "kl_spliced"):
        assert losses[name] == pytest.approx(expected[name], abs=1e-5), name
    assert min(losses["kl_spliced"]) > 1e-3, "the hook has an effect"
    again = cross_entropies(subject, hook_name, saes[:1], texts)
    assert again["spliced"][0] == pytest.approx(losses["spliced"][0], abs=1e-6)
    assert again["zeroed"] == pytest.approx(losses["zeroed"], abs=1e-6)


def test_parameters_exist_once(subject):
    """A second set of modules costs no second set of weights, and hooks of a pass are gone after it."""
    own = {p.data_ptr() for p in subject.transformer.parameters()}
    assert own <= {p.data_ptr() for p in subject.model.original_model.parameters()}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in subject.transformer.modules())
    assert all("forward" not in vars(m) for m in subject.transformer.modules())


def test_whatever_cannot_be_measured_is_refused(subject, texts, monkeypatch):
    hook_name = "blocks.1.hook_resid_pre"
    with pytest.raises(BadInput):
        cross_entropies(subject, "blocks.1.attn.hook_pattern", [random_sae(0)], texts)
    with pytest.raises(BadInput):
        cross_entropies(subject, "blocks.9.hook_resid_pre", [random_sae(0)], texts)
    with pytest.raises(BadInput):
        cross_entropies(subject, hook_name, [random_sae(0)], ["", "a"])
    monkeypatch.setattr(recovered.FinalStates, "logits", lambda self, states: torch.zeros(len(states), 400))
    with pytest.raises(BadInput):  # a head that makes other logits of the same states
        cross_entropies(subject, hook_name, [random_sae(0)], texts)
