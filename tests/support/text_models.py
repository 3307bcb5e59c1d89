"""Small random language models of transformers, each with what sets its attention apart."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from tests.support.tiny_model import IMAGE_TOKEN

SIZES = {
    "vocab_size": IMAGE_TOKEN, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ONE_WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16}

# Latent attention: keys of 8 + 4 numbers a head, values of 6.
LATENT = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 16,
    "q_lora_rank": 12, "head_dim": 4,
}  # fmt: skip
# Linear attention: four value heads, two read a key head; a convolution over three tokens.
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "conv_bias": True}
# Lightning attention, which nothing here divides.
LIGHTNING = {"model_type": "minimax", "layer_types": ["linear_attention", "full_attention", "full_attention"]}
# Mamba 2: eight heads in two groups, chunks of six tokens.
SCANS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 2, "mamba_d_state": 6,
         "mamba_chunk_size": 6}  # fmt: skip
ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "experts_implementation": "eager",
}  # fmt: skip

# model type: what its config has beside SIZES
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen3": {"use_sliding_window": True, **ONE_WINDOW},  # norms of queries and keys
    "gemma2": {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 6, **ONE_WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 6, **ONE_WINDOW},  # two rotary embeddings
    "gpt_oss": {**EXPERTS, "experts_implementation": "eager", **ONE_WINDOW},  # sinks
    "phi3": {"sliding_window": 6},  # one projection for queries, keys and values
    "qwen3_moe": {**EXPERTS, "experts_implementation": "eager", "decoder_sparse_step": 2},
    "olmo2": {},  # norms over all heads
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "n_positions": 64, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0},  # learned positions
    "cohere2": ONE_WINDOW,  # attention beside the feed-forward part
    "gemma3n_text": {  # the last two layers attend to keys and values of those before
        "vocab_size_per_layer_input": IMAGE_TOKEN, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "altup_num_inputs": 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": {  # likewise, with heads of two sizes
        "vocab_size_per_layer_input": IMAGE_TOKEN, "hidden_size_per_layer_input": 8, "global_head_dim": 16,
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "exaone4": ONE_WINDOW,  # every layer names the window, and full ones have no rotary positions
    "gpt_neox": {"attention_bias": True},  # one projection of all heads, in turn
    "deepseek_v3": {**LATENT, **ROUTED},
    "deepseek_v2": {**LATENT, **ROUTED, "topk_method": "greedy"},  # rotary positions as complex numbers
    "llama4_text": {  # chunks of five rows; layers without positions, with a temperature by place
        **EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 5, "no_rope_layers": [1, 0, 1],
        "moe_layers": [1], "floor_scale": 2, "attn_scale": 0.5,
    },
    "longcat_flash": {**LATENT, "num_layers": 2, "ffn_hidden_size": 48, "n_routed_experts": 4, "zero_expert_num": 2,
                      "moe_topk": 2, "expert_ffn_hidden_size": 16, "experts_implementation": "eager"},
    "glm4_moe_lite": {**LATENT, **ROUTED},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # two heads repeat each cached key
    "nemotron": {"partial_rotary_factor": 0.5},  # its layers hand a mask on, and nothing else
    "moshi": {"sliding_window": 5, "ffn_dim": 64},  # a window that nothing reads
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0},
    "mimo_v2_flash": {**ROUTED, "v_head_dim": 6, "sliding_window": 5, "layer_types": ONE_WINDOW["layer_types"]},
    "qwen3_5_text": {**LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                   "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16, "experts_implementation": "eager"},
    "olmo_hybrid": {**LINEAR, "linear_allow_neg_eigval": True},
    "kimi_linear": {
        **LATENT, **ROUTED, "linear_num_heads": 4, "linear_head_dim": 6, "linear_conv_kernel_dim": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "bamba": {**SCANS, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **SCANS, **EXPERTS, "shared_intermediate_size": 16, "experts_implementation": "eager",
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6, "chunk_size": 6,
        "layers_block_type": ["mamba", "attention", "mlp"],
    },
}  # fmt: skip

# Short convolutions, of releases whose layers hand arguments on to them.
if "kwargs" in inspect.signature(Lfm2ShortConv.forward).parameters:
    TEXT_MODELS |= {
        "lfm2": CONVOLUTIONS,
        "lfm3": CONVOLUTIONS,
        "lfm2_moe": {**CONVOLUTIONS, **EXPERTS, "experts_implementation": "eager", "num_dense_layers": 1},
    }


def text_model(kind: str, dtype: torch.dtype = torch.float32, **others: Any) -> nn.Module:
    """A model of the type ``kind``, with the same random weights at every call."""
    others = {**({} if kind == "gpt2" else SIZES), **TEXT_MODELS.get(kind, {}), **others}
    if kind == "gpt2":
        others = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")} | others
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**others))
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return nn.Module.to(model, dtype)
