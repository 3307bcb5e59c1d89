"""A Llama 3.2 Vision model small enough to learn the needle task from random weights on two CPU cores."""

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ds_lvxattn.needle.task import BOS, EOS, IMAGE, PAD, VOCABULARY, NeedleTask

WIDTH = 96


def quickstart_config() -> MllamaConfig:
    """Configuration with 0.64 M parameters, for the vocabulary and the image size of `data.needle`.

    - One tile of 28 pixels in patches of 14: five vision tokens, which the encoder pads to eight. Patches of
      7 make 24 of the same frame, and learn more slowly per second.
    - One local and one global vision layer read a digit; a second local layer cost time and gained nothing.
    - Four query heads over two key-value heads, so that groups of two and of four ranks can share the heads.
    - `initializer_range` is near `WIDTH**-0.5`, which keeps activations at unit scale. The usual 0.02 suits
      widths of thousands; here it leaves the frames without influence, and training stays at chance.
    """
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "attention_heads": 4,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 2 * WIDTH,  # the global layer's output beside that of intermediate layer 0
        "image_size": NeedleTask().image_size,
        "patch_size": 14,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
        "initializer_range": 0.1,
    }
    image_token = VOCABULARY.index(IMAGE)
    text = {
        "vocab_size": image_token,  # as in Llama 3.2 Vision, no logit for the image token
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 4096,
        "bos_token_id": VOCABULARY.index(BOS),
        "eos_token_id": VOCABULARY.index(EOS),
        "pad_token_id": VOCABULARY.index(PAD),
        "initializer_range": 0.1,
    }
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)


def build_quickstart(seed: int) -> MllamaForConditionalGeneration:
    """Build the model in float32 on the CPU; equal seeds give equal weights on every rank.

    The random state of the caller is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = MllamaForConditionalGeneration(quickstart_config())
        for name, parameter in model.named_parameters():
            # Mllama starts its gates at or near zero, to graft new layers onto trained ones. Nothing is
            # trained here, and a closed gate would also stop the gradient of what lies behind it.
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate", "gate_attn", "gate_ffn")):
                parameter.fill_(1.0)
            # Patch embeddings of a few hundred pixels come out at a scale above 1; positions must stand out.
            elif name.endswith("gated_positional_embedding.embedding"):
                parameter.normal_(std=0.5)
    return model
