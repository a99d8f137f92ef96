"""Small real parts for tests, of this package and of plug-ins: tiny models, a byte tokenizer, ready episodes."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pertoken.types import Episode, Item, Span


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes, then `<eos>` (256) and `<pad>` (257). Decodes any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: k for k, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def tiny_model(
    kind: Literal["llama", "gpt2"] = "llama", *, vocab: int = 258, eos: int | None = 256, seed: int = 0
) -> Any:
    """A random two-layer causal LM, rotary (`llama`) or with absolute positions (`gpt2`), float32, in eval mode.

    The weights are larger than at initialisation, so that different contexts give visibly different distributions.
    """
    torch.manual_seed(seed)
    if kind == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, eos_token_id=eos, bos_token_id=None,
                pad_token_id=None,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=eos,
                bos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    model.eval()
    return model


_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 63, "pad_token_id": None,
}  # fmt: skip
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_OLDER = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": 63}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 5}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED | {"head_dim": 16}),
    "gemma": ("gemma", _GROUPED | {"head_dim": 8}),
    "gemma2": ("gemma2", _GROUPED | {"head_dim": 8, "sliding_window": 5}),
    "gemma3": (
        "gemma3_text",
        _GROUPED | {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("phi", _SMALL | {"partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", _OLDER | {"hidden_size": 32, "n_positions": 128}),
    "opt": ("opt", _OLDER | {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "pad_token_id": 1}),
    "gpt_neox": ("gpt_neox", _SMALL),
    "bloom": ("bloom", _OLDER | {"hidden_size": 32}),
}
"""Families of causal LMs that attend, place and normalise in different ways: model type, configuration."""


def family_model(name: str) -> Any:
    """A random two-layer model of a family, float32, in eval mode: 64 ids, of which 63 ends a text."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


def episode(
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    id: str = "e",
    group: int = 0,
    stop: Any = "eos",
    item: Item | None = None,
) -> Episode:
    """A single-turn episode of given ids, sampled with log-prob -1 each."""
    n, m = len(prompt), len(answer)
    spans = [Span(0, n, "prompt", 0)] + ([Span(n, n + m, "action", 1)] if m else [])
    return Episode(
        id=id, item=item or Item(id, "prompt", "answer"), group=group, tokens=[*prompt, *answer],
        action_mask=[False] * n + [True] * m, logprobs=[0.0] * n + [-1.0] * m, env_rewards=[0.0] * (n + m),
        spans=spans, stop=stop, policy_version=(0, 0),
    )  # fmt: skip
