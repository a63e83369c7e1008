"""Keys of the libraries' configuration files, grouped by meaning.

A reader passes each file through its row of `TABLE`. Unknown keys are refused by name.

A reader keeps the following in `SAE.metadata`, for every library:

- `metadata[name]` for the names in `ACTIVATIONS`: how the activations were made, in SAELens' names. `hook_name` is
  TransformerLens' name of the place. `hf_hook_name` is the library's name if it differs. `revision` repeats the value
  inside `model_from_pretrained_kwargs`. `normalize_activations` is present only if it must still be applied.
- `metadata["training"]`: settings of the training, flat, with the library's keys, `architecture`, `k` and the seeds. It
  is absent if the files state nothing.

Values that are absent, None or empty are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from husai.runs.errors import BadInput
from husai.subjects.hooks import hook_name_of

ACTIVATIONS = (
    *("model_name", "model_class_name", "model_kwargs", "model_from_pretrained_kwargs", "revision", "load_in_8bit"),
    *("hook_name", "hf_hook_name", "hook_layer", "hook_head_index", "hook_name_out", "hook_head_index_out", "io"),
    *("dataset_path", "split", "subset", "text_column", "data_args", "is_dataset_tokenized", "use_chat_formatting"),
    *("context_size", "prepend_bos", "seqpos_slice", "exclude_special_tokens", "sequence_separator_token"),
    *("disable_concat_sequences", "autocast_lm", "dtype", "normalize_activations", "max_examples"),
)
"""Names in `SAE.metadata` of settings by which activations were made."""


@dataclass(frozen=True)
class Keys:
    """Keys of one file, grouped by meaning."""

    computes: tuple[str, ...] = ()
    """Keys that change encode or decode, or name shapes. The reader uses each."""
    activations: dict[str, str] = field(default_factory=dict)
    """Key -> name in `SAE.metadata`."""
    training: tuple[str, ...] = ()
    """Keys of the training's settings."""
    run: tuple[str, ...] = ()
    """Keys of machine, paths and logs of the run. They are dropped."""

    def split(self, config: dict[str, Any], location: str) -> Described:
        """The configuration, grouped by meaning.

        Raises:
            BadInput: a key is unknown.
        """
        known = {*self.computes, *self.activations, *self.training, *self.run}
        for key in sorted(set(config) - known):
            raise BadInput(
                f"{location}: {key} ({config[key]!r}) is not known; it may change what the SAE computes or how its "
                "activations were made; remove it from the file if it changes neither"
            )
        given = {key: value for key, value in config.items() if value not in (None, [], {}, ())}
        return Described(
            {key: config[key] for key in self.computes if key in config},
            {name: given[key] for key, name in self.activations.items() if key in given},
            {key: given[key] for key in self.training if key in given},
        )


@dataclass(frozen=True)
class Described:
    """Content of a file, grouped by meaning."""

    computes: dict[str, Any] = field(default_factory=dict)
    activations: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


# Keys of SAELens since version 3. Versions 3 to 5 write the whole configuration of a run into a checkpoint's cfg.json.
# Version 6 writes the configuration of the training class, and that of the run into runner_cfg.json.
_SAELENS_SAE = (
    *("architecture", "d_in", "d_sae", "d_out", "k", "apply_b_dec_to_input", "normalize_activations"),
    *("reshape_activations", "rescale_acts_by_decoder_norm", "metadata"),
    *("activation_fn", "activation_fn_str", "activation_fn_kwargs", "finetuning_scaling_factor"),  # before 6
)
SAELENS_OBJECTS = (
    *("residual_threshold", "max_iterations", "stop_on_duplicate_support", "n_heads", "n_attn_layers"),
    *("bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights", "activation_normalization_factor"),
)
"""Settings of matching-pursuit and temporal SAEs, which SAELens' own objects compute."""
_SAELENS_ACTIVATIONS = {
    name: name
    for name in ACTIVATIONS
    if name not in ("io", "split", "subset", "text_column", "data_args", "load_in_8bit", "max_examples")
    if name not in ("normalize_activations", "revision")
}
_SAELENS_BEFORE_3 = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
}
_SAELENS_ABOUT = {name: name for name in ("neuronpedia_id", "sae_lens_version", "sae_lens_training_version")}
_SAELENS_LOSSES = (
    *("l1_coefficient", "l1_warm_up_steps", "lp_norm", "decoder_init_norm", "l0_coefficient", "l0_warm_up_steps"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
    *("jumprelu_ste_to_input", "pre_act_loss_coefficient", "target_l0", "use_sparse_activations"),
    *("aux_loss_coefficient", "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss"),
    # Versions 3 to 5.
    *("use_ghost_grads", "normalize_sae_decoder", "noise_scale", "mse_loss_normalization", "decoder_orthogonal_init"),
    *("decoder_heuristic_init", "decoder_heuristic_init_norm", "init_encoder_as_decoder_transpose"),
    *("scale_sparsity_penalty_by_decoder_norm", "b_dec_init_method", "expansion_factor"),
)
_SAELENS_TRAINING = (
    *("seed", "training_tokens", "train_batch_size_tokens", "store_batch_size_prompts", "n_batches_in_buffer"),
    *("activations_mixing_fraction", "lr", "lr_scheduler_name", "lr_warm_up_steps", "lr_end", "lr_decay_steps"),
    *("n_restart_cycles", "adam_beta1", "adam_beta2", "autocast", "dead_feature_window", "dead_feature_threshold"),
    *("from_pretrained_path", "n_batches_for_norm_estimate", "finetuning_tokens", "finetuning_method"),
)
_SAELENS_RUN = (
    *("device", "llm_device", "act_store_device", "dataset_trust_remote_code", "streaming", "hook_eval"),
    *("use_cached_activations", "cached_activations_path", "prefetch_llm_batches", "compile_llm", "compile_sae"),
    *("llm_compilation_mode", "sae_compilation_mode", "feature_sampling_window", "n_eval_batches", "logger"),
    *("eval_batch_size_prompts", "n_checkpoints", "checkpoint_path", "save_final_checkpoint", "output_path"),
    *("resume", "resume_from_checkpoint", "verbose", "run_name", "log_to_wandb", "log_activations_store_to_wandb"),
    *("log_optimizer_state_to_wandb", "log_weights_to_wandb", "wandb_project", "wandb_id", "wandb_entity"),
    *("wandb_log_frequency", "eval_every_n_wandb_logs", "tokens_per_buffer"),
)

TABLE = {
    "sae_lens cfg.json": Keys(
        (*_SAELENS_SAE, *SAELENS_OBJECTS),
        _SAELENS_BEFORE_3 | _SAELENS_ACTIVATIONS | _SAELENS_ABOUT,
        (*_SAELENS_LOSSES, *_SAELENS_TRAINING),
        _SAELENS_RUN,
    ),
    "sae_lens runner_cfg.json": Keys(("sae",), _SAELENS_ACTIVATIONS | _SAELENS_ABOUT, _SAELENS_TRAINING, _SAELENS_RUN),
    "dictionary_learning config.json trainer": Keys(
        ("dict_class", "activation_dim", "dict_size", "k"),
        {"lm_name": "model_name", "submodule_name": "hook_name", "layer": "hook_layer"},
        (
            *("trainer_class", "seed", "steps", "lr", "l1_penalty", "l0_penalty", "warmup_steps", "decay_start"),
            *("sparsity_warmup_steps", "resample_steps", "auxk_alpha", "top_k_aux", "threshold_beta"),
            *("threshold_start_step", "group_fractions", "group_weights", "group_sizes", "weights_temperature"),
            *("bandwidth", "sparsity_penalty", "target_l0", "sparsity_function", "p_start", "p_end", "anneal_start"),
            *("anneal_end", "sparsity_queue_length", "n_sparsity_updates", "lambda_warm_steps", "norm_factor"),
            *("adaptive_sparsity_penalty", "activation_queue_length", "sparsity_loss_queue_length", "k_anneal_steps"),
            *("steps_before_annealing", "sparsity_coefficient", "gp_reg_coeff", "initial_sparsity_penalty"),
        ),
        ("device", "wandb_name"),
    ),
    "dictionary_learning config.json buffer": Keys(
        (),
        {"ctx_len": "context_size", "io": "io"},
        ("n_ctxs", "refresh_batch_size", "out_batch_size"),
        ("d_submodule", "device", "layer"),
    ),
    "sparsify cfg.json": Keys(
        ("activation", "num_latents", "k", "d_in", "signed", "skip_connection", "transcode"),
        {},
        ("expansion_factor", "normalize_decoder", "multi_topk"),
    ),
    "sparsify config.json": Keys(
        ("sae",),
        {
            **{"model": "model_name", "dataset": "dataset_path", "ctx_len": "context_size", "revision": "revision"},
            "exclude_tokens": "exclude_special_tokens",
            **{name: name for name in ("split", "subset", "text_column", "data_args", "load_in_8bit", "max_examples")},
        },
        (
            *("init_seeds", "shuffle_seed", "seed", "batch_size", "grad_acc_steps", "micro_acc_steps", "loss_fn"),
            *("optimizer", "lr", "lr_warmup_steps", "k_decay_steps", "auxk_alpha", "dead_feature_threshold"),
            *("finetune", "train_on_backward"),
        ),
        (
            *("hookpoints", "layers", "layer_stride", "distribute_modules", "distribute_layers", "save_every"),
            *("save_best", "save_dir", "log_to_wandb", "run_name", "wandb_log_frequency", "wandb_project"),
            *("hf_token", "resume", "data_preprocessing_num_proc", "attn_implementation", "tp"),
        ),
    ),
}
"""Library and file -> its keys."""


def metadata_of(*described: Described, location: str) -> dict[str, Any]:
    """`SAE.metadata` from several files of one checkpoint, in the form that the module's docstring gives.

    Raises:
        BadInput: two files contradict each other about the activations.
    """
    metadata: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for one in described:
        for name, value in one.activations.items():
            value = str(value).removeprefix("torch.") if name == "dtype" else value
            if name in ACTIVATIONS and metadata.get(name, value) != value:
                raise BadInput(
                    f"{location}: {name} is {metadata[name]!r}, and {value!r} in the configuration of its run; "
                    "one value expected"
                )
            metadata[name] = value
        training |= {key: value for key, value in one.training.items() if key not in training}
    revision = (metadata.get("model_from_pretrained_kwargs") or {}).get("revision")
    metadata |= {} if revision is None else {"revision": revision}
    if (place := metadata.get("hook_name")) and hook_name_of(str(place)) != place:
        metadata |= {"hook_name": hook_name_of(str(place)), "hf_hook_name": place}
    return metadata | ({"training": training} if training else {})
