"""Tiny random models of many families: whatever attends in its own way must give its own numbers here too."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 63, "pad_token_id": None,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": ("llama", GROUPED),
    "mistral-window": ("mistral", GROUPED | {"sliding_window": 5}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "gemma": ("gemma", GROUPED | {"head_dim": 8}),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 8, "sliding_window": 5}),
    "gemma3": ("gemma3_text", GROUPED | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("phi", SMALL | {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", GROUPED),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": None, "eos_token_id": 63}),
    "opt": ("opt", {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 63, "pad_token_id": 1}),
    "gpt_neox": ("gpt_neox", SMALL),
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 63}),
}  # fmt: skip


def family_model(name: str):
    """A random model of the family, in eval mode, with weights large enough to tell contexts apart."""
    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), attn_implementation="eager")
    if name not in ("gemma2", "gpt2"):
        pass
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()
