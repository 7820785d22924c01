"""Every family of causal LMs that transformers knows -> a tiny random model of it, built in a second.

One shrinker knows what the options of configs are called; `ROWS` says where a family needs something else. Weights are
wide enough that logits spread over tens of nats, biases and norm weights are random (one that is dropped shows), and
softcaps, scales and sliding windows have values that matter at six tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

LAYERS, TOWER_LAYERS, VOCABULARY, HIDDEN = 6, 2, 256, 64

# A value, and the options that get it. What a position sees and what an indexer picks is less than six tokens; what is
# done to logits is done with a number that shows.
_OPTIONS = f"""
null num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers num_blocks depth
null encoder_layers num_encoder_layers
{TOWER_LAYERS} conf_num_hidden_layers num_global_layers
{VOCABULARY} vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size shape_vocab_size
{VOCABULARY} pronunciation_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base
{HIDDEN} hidden_size d_model n_embd emb_dim embed_dim embedding_dim hidden_size_global backbone_hidden_size
{HIDDEN} out_hidden_size vision_output_dim projector_input_dim projector_output_dim adapter_in_dim adapter_input_size
{HIDDEN} adapter_out_dim lru_width mamba_d_ssm mlp_dim output_channels nemo_conv_channels
{HIDDEN} ext_pw_out_channel depthwise_separable_out_channel
128 max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
96 intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner
96 dense_intermediate_size intermediate_size_mlp feed_forward_size
32 moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size
32 moe_shared_expert_intermediate_size expert_ffn_hidden_size router_hidden_size q_lora_rank kv_lora_rank o_lora_rank
32 hc_lowrank mamba_head_dim image_size crop_size embedding_size word_embed_proj_dim input_embedding_size
32 output_embedding_size shape_embed_dim pronunciation_embed_dim block_multiple_of index_n_heads
16 head_dim swa_head_dim v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim dim_head
16 d_head kv_channels mamba_d_state ssm_state_size rel_extent position_bias_num_buckets
8 qk_rope_head_dim qk_nope_head_dim rotary_dim hidden_size_per_layer_input patch_size chunk_size mamba_chunk_size
8 laurel_rank adapter_rank local_attention
4 num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads num_decoder_attention_heads
4 encoder_attention_heads num_encoder_attention_heads conf_num_attention_heads swa_num_attention_heads
4 linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads n_mamba_heads
4 num_experts num_local_experts n_routed_experts moe_num_experts
4 sliding_window sliding_window_size attention_window_size window_size attention_chunk_size keep_window_size index_topk
3 max_window_layers
2 num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads n_groups o_groups
2 num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k zero_expert_num num_codebooks
2 n_layers_per_attn_res_block eos_token_id sep_token_id
1 n_group topk_group num_expert_group bos_token_id cls_token_id decoder_start_token_id
0 pad_token_id
true use_sliding_window
0.7 residual_multiplier
0.8 logit_scale lm_head_multiplier
1.25 logits_scaling logits_mup_width_multiplier
8.0 final_logit_softcapping logits_soft_cap output_logit_soft_cap
"""
_VALUES: dict[str, Any] = {
    name: json.loads(value) for value, *names in map(str.split, _OPTIONS.strip().splitlines()) for name in names
}

_UNTIED = {"tie_word_embeddings": False}  # tied, the token that was read drowns what the layers say
_MIXED = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
_HYBRID = ["linear_attention", "full_attention", "linear_attention"] * 2
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2}
_NO_LIMIT = {"time_step_min": 1e-30}  # their single step does not clamp to it as their full forward does
_CONV = {"layer_types": ["conv", "conv", "full_attention"] * 2}
# Each kind of layer, before and among those that share the keys of earlier ones.
_GEMMA3N = {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
_GEMMA4 = _GEMMA3N | {"global_head_dim": 32}
_NO_EMBEDDINGS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_LLAMA4 = {"moe_layers": [1, 3, 5], "num_experts_per_tok": 1}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [3],  # counted from one
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 8,
}
_SWA = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "head_dim": 16}
_DOTS3 = {"head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16} | {f"swa_{k}": v for k, v in _SWA.items()}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# transformers' model_type -> the options of its config that differ from what `_shrunk` gives; for the configs inside
# it, such as text_config, likewise. Most say how kinds of layers alternate, or relate sizes that have to agree.
ROWS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "biogpt": _UNTIED,
    "cohere_compass_text": _MIXED | {"rope_parameters": {kind: _ROPE for kind in _MIXED["layer_types"]}},
    "ctrl": _UNTIED,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # it reads both and has no usable default of either
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
        "partial_rotary_factor": 0.5,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"pyramid_num_routed": [-1, 4]}},
    "dots3_note_text": _DOTS3,
    "falcon_mamba": _UNTIED,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_assistant": {"text_config": _GEMMA4 | _NO_EMBEDDINGS | {"num_kv_shared_layers": LAYERS}},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_assistant": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hy_v4": {"indexer_types": None},  # the first layer has to index; among the last six of the default it does not
    "inkling_text": {"unpadded_vocab_size": VOCABULARY - 6},
    "laguna": _MIXED,
    "lfm2": _CONV,
    "lfm2_moe": _CONV | {"num_dense_layers": 1},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"head_dim": 8},
    "mamba": _UNTIED,
    "mamba2": {"head_dim": 32},
    "mellum": _MIXED,
    "minicpm3": _UNTIED | {"dim_model_base": 48},  # before the unembedding the state is divided by 64 / 48
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention"] * 2 + ["minimax_m3_sparse"] * 4,
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        "index_block_size": 2,
        "index_n_heads": 2,
        "index_topk_blocks": 1,
    },
    "moshi": {"sliding_window": 128},  # its mask does not know of the window that its cache keeps
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "linear_attention", "mlp", "full_attention", "moe"]}
    | _NO_LIMIT,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "xglm": _UNTIED,
    "xlstm": {"qk_dim_factor": 1.0},  # its cache rounds this width up to 64
    "xmod": {"default_language": "en_XX"},
    "zamba": _UNTIED | _ZAMBA | {"attention_head_dim": 32},
    "zamba2": _ZAMBA | _NO_LIMIT,
    "zaya": {"layer_types": ["hybrid_sliding", "hybrid"] * 3, "num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    """A config of the family: LAYERS layers, of every kind that it has, and VOCABULARY tokens, the first three special.

    The ids that stand for images and sounds are left where they are, beyond the vocabulary: no text has them.

    Args:
        model_type: one of transformers' MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.
        options: of the config; they go before those of the family's row.

    Raises:
        ValueError: transformers knows no such model type.
    """
    base = {"text_config": _NO_EMBEDDINGS} if model_type == "gemma4_assistant" else {}  # it refuses its own defaults
    config = _shrunk(AutoConfig.for_model(model_type, **base), LAYERS, ROWS.get(model_type, {}) | options)
    if model_type.endswith("_assistant"):
        # Its layers all share the keys of another model's, and transformers 5.23 builds none of which that is true.
        config.text_config.num_kv_shared_layers = 2
    if model_type == "gemma3n":
        # Its own vision tower needs timm and PIL. Text asks a tower for three numbers, and any has them.
        numbers = {name: getattr(config.vision_config, name) for name in ("vocab_size", "vocab_offset", "rms_norm_eps")}
        vars(config)["vision_config"] = _shrunk(AutoConfig.for_model("siglip_vision_model"), TOWER_LAYERS, numbers)
    return config


def tiny_model(
    model_type: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    mapping: Mapping[Any, Any] = MODEL_FOR_CAUSAL_LM_MAPPING,
    **options: Any,
) -> PreTrainedModel:
    """The causal LM that transformers maps the family to, with random weights, in evaluation mode.

    Args:
        model_type: as in `tiny_config`; so are `options`.
        dtype: of its parameters and buffers. Weights are drawn in float32 whatever it is.
        seed: of its weights. The global generator is left as it was.
        mapping: another of transformers' mappings from configs to classes, such as that of models that read images.

    Returns:
        For ids `[B, T]` its logits are `[B, T, VOCABULARY]`, unless it is one that needs more than ids.

    Raises:
        ValueError: transformers knows no such model type.
    """
    config = tiny_config(model_type, **options)
    kind: Any = mapping[type(config)]
    parts = [vars(config).get(name) for name in config.sub_configs]  # the text part, where the model has only that
    config = next((part for part in parts if isinstance(part, kind.config_class)), config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)  # 1.2 / sqrt(D): every layer turns the residual stream, none drowns it
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # biases, norm weights, decays
        head = model.get_output_embeddings()
        for weight in head.parameters() if head is not None else ():
            weight.mul_(3)
    # `to` would take the imaginary part off llama4's rotary frequencies.
    return (model if dtype == torch.float32 else model.to(dtype)).eval()


def _shrunk(config: PreTrainedConfig, layers: int, row: dict[str, Any]) -> PreTrainedConfig:
    """The config with its options made small, `row` before all; so are the configs inside it."""
    alias = config.attribute_map
    row = {alias.get(name, name): value for name, value in row.items()}
    given = {alias.get(name, name): value for name, value in config.to_dict().items()}
    depth = getattr(config, "num_hidden_layers", None)
    layers = row.get(alias.get("num_hidden_layers", "num_hidden_layers"), layers)
    options: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(part := vars(config).get(name), PreTrainedConfig):
            inner = layers if "text" in name or "decoder" in name else TOWER_LAYERS
            options[name] = _shrunk(part, inner, row.pop(name, {}))
        elif name in _VALUES:
            options[name] = layers if _VALUES[name] is None else _VALUES[name]
        elif isinstance(value, list) and len(value) == depth and any(item != value[0] for item in value):
            options[name] = _resampled(value, layers)
    if "kv_lora_rank" in given:  # latent attention: each head has keys of its own; head_dim is their rotary part
        options["num_key_value_heads"] = options["num_attention_heads"]
        options.pop("head_dim", None)
    if "gemma" in config.model_type:
        options |= _UNTIED
    return type(config)(**(options | row))


def _resampled(values: list[Any], layers: int) -> list[Any]:
    """What a config says layer by layer, for fewer layers: its last ones, after one of each kind not among them."""
    if values == list(range(len(values))):
        return values[:layers]
    last = values[-layers:]
    missing = [value for value in dict.fromkeys(values) if value not in last]
    return missing + last[len(missing) :]
