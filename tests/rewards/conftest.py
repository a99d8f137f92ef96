"""Small real tokenizers, and scenes built by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from pertoken.rewards import Scene
from pertoken.types import Episode, Item, Span, TokenBatch

CORPUS = [
    "The cat sat on the mat, and the dog didn't sleep. Returns the sum of two numbers.",
    "Ein Vögelchen saß auf dem Dach; naïve café, señor. 3.5 million & counting!",
    "猫坐在垫子上。你好，世界！ 東京は日本の首都です。",
    "القطة على السجادة. Кошка сидит на коврике. 😀👩‍👩‍👧 e\u0301",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
PROMPT = [1, 5]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(*, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """As GPT-2, SmolLM2, Llama-3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool call>"])  # not special: it is text
    return wrap(tokenizer)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama-2: a metaspace written by the normaliser, bytes for unknown characters, one leading space stripped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] |= {piece: len(state["model"]["vocab"]) + k for k, piece in enumerate(BYTE_PIECES)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrap(tokenizer)


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """As T5 and XLM-R, with byte fallback."""
    pieces = [
        (piece, -float(2 + k % 7)) for k, piece in enumerate(["▁the", "▁cat", "▁", "s", "at", "e", "th", "c", "猫"])
    ]
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + [(piece, -20.0) for piece in BYTE_PIECES] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return wrap(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.WordPiece()
    return wrap(tokenizer)


def characters(*, decoder: Any = decoders.Fuse()) -> PreTrainedTokenizerFast:  # noqa: B008
    """One token per character; without a decoder, tokens are joined by spaces."""
    vocabulary = {piece: k for k, piece in enumerate([*SPECIAL, *sorted(set("".join(CORPUS)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    if decoder is not None:
        tokenizer.decoder = decoder
    return wrap(tokenizer)


STORIES = Path("/work/shared/models/stories260k")
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "byte_level_no_merges": lambda: byte_level(vocab_size=1),
    "sentencepiece_bpe": sentencepiece_bpe,
    "metaspace_unigram": metaspace_unigram,
    "wordpiece": wordpiece,
    "characters": characters,
    "joined": lambda: characters(decoder=None),
    "bpe_decoder": lambda: characters(decoder=decoders.BPEDecoder()),  # a kind that align.py does not know
    "code_points": CanineTokenizer,  # written in Python, without a decoder to read
    "bytes": ByT5Tokenizer,
}
if STORIES.is_dir():
    TOKENIZERS["stories260k"] = lambda: AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture(scope="session", params=list(TOKENIZERS))
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    return sentencepiece_bpe()


@pytest.fixture(scope="session")
def letters(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    """The ids of an ASCII text with one token per character, whatever the tokenizer would merge."""
    return lambda text: tokenizer.convert_tokens_to_ids(list(text.replace(" ", "Ġ")))


@pytest.fixture(scope="session")
def make_episode(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Episode]:
    """An episode of a completion (text or ids); `mask` speaks of the completion only and is all True by default."""

    def episode(
        completion: str | list[int],
        answer: str | None = None,
        *,
        mask: Sequence[int] | None = None,
        env: Sequence[float] | None = None,
        eos: bool = True,
        prompt: Sequence[int] = PROMPT,
        **fields: Any,
    ) -> Episode:
        ids = tokenizer.encode(completion, add_special_tokens=False) if isinstance(completion, str) else completion
        ids = list(ids) + [tokenizer.eos_token_id] * (eos and isinstance(completion, str))
        item = Item(id="item-" + str(fields.get("id", 0)), prompt="?", answer=answer, info=fields.pop("info", {}))
        before = len(prompt)
        return Episode(
            **{"id": "0", "group": 0, "stop": "eos", "policy_version": (0, 0), **fields},
            item=item,
            tokens=[*prompt, *ids],
            action_mask=[False] * before + [bool(acts) for acts in (mask if mask is not None else [1] * len(ids))],
            logprobs=[0.0] * (before + len(ids)),
            env_rewards=[0.0] * before + list(env if env is not None else [0.0] * len(ids)),
            spans=[Span(0, before, "prompt", 0)],
        )

    return episode


@pytest.fixture(scope="session")
def make_scene(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Scene]:
    """The scene of some episodes, padded with EOS on the right; exact (float64) unless told otherwise."""

    def scene(*episodes: Episode, padding: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> Scene:
        width = max(len(episode.tokens) for episode in episodes) + padding

        def column(name: str, kind: torch.dtype, fill: Any) -> torch.Tensor:
            return torch.tensor(
                [list(getattr(e, name)) + [fill] * (width - len(e.tokens)) for e in episodes], dtype=kind
            )

        lengths = torch.tensor([len(e.tokens) for e in episodes])
        batch = TokenBatch(
            tokens=column("tokens", torch.long, tokenizer.eos_token_id),
            attention_mask=torch.arange(width) < lengths[:, None],
            action_mask=column("action_mask", torch.bool, False),
            sample_logprobs=column("logprobs", dtype, 0.0),
            env_rewards=column("env_rewards", dtype, 0.0),
            turn=torch.zeros(len(episodes), width, dtype=torch.long),
            group=torch.tensor([e.group for e in episodes]),
            terminated=torch.tensor([e.terminated for e in episodes]),
            episode_ids=tuple(e.id for e in episodes),
        )
        return Scene(batch, episodes, fields.pop("tokenizer", tokenizer), **fields)

    return scene
