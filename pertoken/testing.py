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


def tiny_encoder_decoder(kind: Literal["t5", "marian"] = "t5", *, seed: int = 0) -> Any:
    """A random two-layer encoder-decoder LM for `byte_tokenizer`, float32, in eval mode; padding begins its texts."""
    from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    ends: dict[str, Any] = {
        "vocab_size": 258,
        "d_model": 32,
        "pad_token_id": 257,
        "eos_token_id": 256,
        "decoder_start_token_id": 257,
    }
    if kind == "t5":
        model: Any = T5ForConditionalGeneration(T5Config(**ends, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    else:
        model = MarianMTModel(
            MarianConfig(
                **ends, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, forced_eos_token_id=None,
            )
        )  # fmt: skip
    return model.eval()


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

_READS_AND_WRITES = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 63, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 63, "decoder_start_token_id": 0,
}  # fmt: skip

ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "t5 v1.1": ("t5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", _T5),
    "bart": ("bart", _READS_AND_WRITES),
    "bart, first token forced": ("bart", _READS_AND_WRITES | {"forced_bos_token_id": 0}),
    "marian": ("marian", _READS_AND_WRITES | {"scale_embedding": True}),
    "mbart": ("mbart", _READS_AND_WRITES),
    "m2m_100": ("m2m_100", _READS_AND_WRITES),
    "pegasus": ("pegasus", _READS_AND_WRITES),
}
"""Families of encoder-decoder LMs, NLLB among them (its models are `m2m_100`): model type, configuration."""


def family_model(name: str) -> Any:
    """A random two-layer model of a family, float32, in eval mode: 64 ids, of which 63 ends a text."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    auto, families = (
        (AutoModelForSeq2SeqLM, ENCODER_DECODERS) if name in ENCODER_DECODERS else (AutoModelForCausalLM, FAMILIES)
    )
    kind, settings = families[name]
    torch.manual_seed(0)
    model = auto.from_config(CONFIG_MAPPING[kind](**settings), attn_implementation="eager", trust_remote_code=False)  # type: ignore[no-untyped-call]
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
