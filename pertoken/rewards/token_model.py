"""A learned reward of tokens: a trunk (any encoder or causal model) and a linear head with a number for each token.

The model has a tokenizer of its own. It gets the text, and where it was trained so what stands before it, and says what
each of its own tokens is worth; these values go to the policy's tokens by the characters that they share.

    folder/reward.json          format, version, how scores are made, what it was trained on, held-out figures
    folder/head.safetensors     the head
    folder/trunk/               the trunk and its tokenizer, as transformers saves them (safetensors)
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from pertoken.errors import ModelError
from pertoken.hub import NO_CODE, SAFE
from pertoken.reading import Reading
from pertoken.rewards.align import AlignedText, CharSpan, spread
from pertoken.rewards.base import Sample, SampleReward
from pertoken.rewards.semantics import (
    EMBEDDED,
    REMEMBERED,
    minilm_folder,
    other_texts,
    reading_of,
    window_of,
    without_bars,
)

FORMAT = "pertoken-token-reward"
FORMAT_VERSION = 1
ABOUT = "reward.json"

Sign = Literal["free", "cost"]
"""`free`: a token's score is any number. `cost`: it is at most 0, -softplus of the head's output."""
Total = Literal["sum", "mean"]
"""What the score of a text is of the scores of its tokens."""


@dataclass(frozen=True)
class Piece:
    """A text, or as much of it as fits into the model's window, as ids."""

    ids: list[int]
    types: list[int] | None
    """Segment ids, for models that have them."""
    columns: list[int]
    """Which of the ids are tokens of the text that are scored here; each token of a text is, in one piece."""
    spans: list[CharSpan]
    """The characters of each of those."""


class TokenScorer(nn.Module):
    """Text -> a number for each of the model's own tokens."""

    def __init__(
        self,
        trunk: Any,
        tokenizer: Any,
        *,
        sign: Sign = "free",
        total: Total = "sum",
        context: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        """A scorer with a new head. `context`: a text before the scored one is read too. `max_tokens`: largest window;
        None takes the model's."""
        super().__init__()
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} cannot say which characters a token is of: a fast one is needed"
            )
        if getattr(trunk.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(trunk).__name__} has an encoder and a decoder: expected one of them as trunk")
        self.trunk, self.tokenizer = trunk, tokenizer
        self.sign, self.total, self.context, self.max_tokens = sign, total, context, max_tokens
        self.head = nn.Linear(trunk.config.get_text_config().hidden_size, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.constant_(self.head.bias, -2.0 if sign == "cost" else 0.0)  # texts begin at almost no cost
        window = window_of(tokenizer, trunk.config)
        self._window = min(window, max_tokens or window)
        room = self._window - tokenizer.num_special_tokens_to_add(pair=context)
        if room < 2:
            raise ModelError(f"a window of {self._window} tokens has no room for text; raise max_tokens")
        self._values = functools.lru_cache(maxsize=REMEMBERED)(self._score)

    def encode(self, text: str, context: str = "") -> list[Piece]:
        """`text` in as few pieces as its window allows: they overlap, and each token is scored where it has more text
        around it. Of a long context the end counts, up to half of the window."""
        before = [self._end_of(context)] if self.context else []
        inputs = self.tokenizer(
            *before, text, truncation="only_second" if before else True, max_length=self._window,
            stride=self._window // 8, return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        pieces, own = [], len(before)
        for k, ids in enumerate(inputs["input_ids"]):
            sequence = inputs.sequence_ids(k)
            columns = [column for column, which in enumerate(sequence) if which == own]
            spans = [tuple(inputs["offset_mapping"][k][column]) for column in columns]
            types = inputs["token_type_ids"][k] if "token_type_ids" in inputs else None
            pieces.append(Piece(ids, types, columns, spans))
        return _each_once(pieces)

    def _end_of(self, context: str) -> str:
        inputs = self.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        room = self._window // 2
        offsets = inputs["offset_mapping"]
        return context if len(offsets) <= room else context[offsets[-room][0] :]

    def forward(self, pieces: Sequence[Piece]) -> Float[Tensor, "B T"]:
        """The score of each scored token, 0 in all other cells; rows are padded on the right."""
        device, width = self.head.weight.device, max(len(piece.ids) for piece in pieces)
        padding = self.tokenizer.pad_token_id or 0

        def rows(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row in lists], device=device)

        lengths = torch.tensor([len(piece.ids) for piece in pieces], device=device)
        inputs = {
            "input_ids": rows([piece.ids for piece in pieces], padding),
            "attention_mask": (torch.arange(width, device=device) < lengths[:, None]).long(),
        }
        if pieces[0].types is not None:
            inputs["token_type_ids"] = rows([piece.types or [] for piece in pieces], 0)
        return torch.where(scored(pieces, width).to(device), self._scores(**inputs), 0.0)

    def _scores(self, **inputs: Tensor) -> Float[Tensor, "B T"]:
        outputs: Tensor = self.head(self.trunk(**inputs).last_hidden_state)[..., 0]
        return -functional.softplus(outputs) if self.sign == "cost" else outputs

    def readings(self, text: str, context: str, aligned: AlignedText) -> list[Reading]:
        """What is read to score `text`, which `aligned` has as tokens; each token is asked about in the piece that it
        is scored in, and in no other."""
        pieces = self.encode(text, context)
        divisor = max(1, sum(len(piece.spans) for piece in pieces)) if self.total == "mean" else 1
        return [self._reading(piece, aligned, divisor) for piece in pieces if piece.columns]

    def _reading(self, piece: Piece, aligned: AlignedText, divisor: int) -> Reading:
        ids = torch.tensor(piece.ids, device=self.head.weight.device)
        beside = {"attention_mask": torch.ones_like(ids)}
        if piece.types is not None:
            beside["token_type_ids"] = torch.tensor(piece.types, device=ids.device)

        def score(rows: Float[Tensor, "N L H"]) -> Float[Tensor, " N"]:
            inputs = {name: cells.expand(len(rows), -1) for name, cells in beside.items()}
            return self._scores(inputs_embeds=rows, **inputs)[:, piece.columns].sum(1) / divisor

        return reading_of(self.trunk, self.tokenizer, ids, piece.columns, piece.spans, aligned, score)

    def values(self, text: str, context: str = "") -> list[tuple[CharSpan, float]]:
        """Characters and value of each of the model's tokens; the values add up to the score of the text.

        Remembered, and computed for the text alone: no number depends on what else is scored.
        """
        return self._values(text, context)

    @torch.no_grad()
    def _score(self, text: str, context: str) -> list[tuple[CharSpan, float]]:
        found: list[tuple[CharSpan, float]] = []
        for piece in self.encode(text, context):
            if piece.columns:
                scores = self([piece])[0, piece.columns].double().tolist()
                found += zip(piece.spans, scores, strict=True)
        divisor = len(found) if self.total == "mean" else 1
        return [(span, value / divisor) for span, value in found]

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the model to `folder`, which exists, with `about` beside what loading needs."""
        how = {"sign": self.sign, "total": self.total, "context": self.context, "max_tokens": self.max_tokens}
        content = {"format": FORMAT, "version": FORMAT_VERSION, **how, **about}
        with without_bars():
            self.trunk.save_pretrained(folder / "trunk")
        self.tokenizer.save_pretrained(folder / "trunk")
        save_file({name: each.detach().cpu().contiguous() for name, each in self.head.state_dict().items()},
                  folder / "head.safetensors")  # fmt: skip
        (folder / ABOUT).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TokenScorer":
        """The model that `save` wrote, ready to score."""
        place = Path(folder).expanduser()
        about = read_about(place)
        how: dict[str, Any] = {key: about.get(key) for key in ("sign", "total", "context", "max_tokens")}
        if how["sign"] not in get_args(Sign) or how["total"] not in get_args(Total):
            raise ModelError(f"{place / ABOUT}: expected a sign and a total that are known here, got {how}")
        scorer = cls(*load_trunk(str(place / "trunk"), "token_model.path"), **how)
        try:
            scorer.head.load_state_dict(load_file(place / "head.safetensors"))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{place / 'head.safetensors'} cannot be read: {str(error)[:200]}") from error
        return scorer.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_about(folder: Path) -> dict[str, Any]:
    """`reward.json` of a folder of token rewards; ModelError if it is none, or of another version."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} is no folder of a token reward: {ABOUT} cannot be read ({error}); `pertoken reward train` makes "
            "such folders"
        ) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ModelError(
            f"{folder / ABOUT}: expected format {FORMAT!r}; classifiers are for `classifier` and `entailment`"
        )
    if about.get("version") != FORMAT_VERSION:
        raise ModelError(
            f"{folder} is of version {about.get('version')}, and this version of pertoken reads {FORMAT_VERSION}: "
            "train it again, or use the version that made it"
        )
    return about


def load_trunk(name: str, where: str, layers: int | None = None) -> tuple[Any, Any]:
    """A model without head and its tokenizer, by embedded name, folder or hub name; `layers` keeps the first ones."""
    from transformers import AutoModel, AutoTokenizer

    source = str(minilm_folder()) if name == EMBEDDED else str(Path(name).expanduser())
    cut = {} if layers is None else {"num_hidden_layers": layers}
    try:
        with without_bars():
            model = AutoModel.from_pretrained(source, dtype=torch.float32, **SAFE, **cut)
            return model.eval(), AutoTokenizer.from_pretrained(source, **NO_CODE)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where}: {name!r} is no model in safetensors that can be reached from here ({str(error)[:200]}); "
            f"embedded: {EMBEDDED}"
        ) from error


def scored(pieces: Sequence[Piece], width: int) -> Bool[Tensor, "B T"]:
    """Which cells hold tokens that are scored."""
    mask = torch.zeros(len(pieces), width, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        mask[row, piece.columns] = True
    return mask


def _each_once(pieces: list[Piece]) -> list[Piece]:
    """Overlapping pieces with each token scored in one of them: of an overlap the first half in the earlier one."""
    kept = []
    begin = 0
    for k, piece in enumerate(pieces):
        end = len(piece.spans)
        following = pieces[k + 1].spans if k + 1 < len(pieces) else []
        overlap = _overlap(piece.spans, following)
        end -= overlap - overlap // 2
        kept.append(Piece(piece.ids, piece.types, piece.columns[begin:end], piece.spans[begin:end]))
        begin = overlap // 2
    return kept


def _overlap(one: Sequence[CharSpan], following: Sequence[CharSpan]) -> int:
    """How many tokens at the end of `one` open `following`."""
    longest = min(len(one), len(following))
    return next((n for n in range(longest, 0, -1) if list(one[-n:]) == list(following[:n])), 0)


scorer_of = functools.cache(TokenScorer.load)
"""The scorer of a folder."""


@dataclass(frozen=True)
class TokenModel(SampleReward):
    """What a learned reward of tokens gives, on the tokens that share characters with those of the model.

    The sum over a completion is the model's score of its text. `pertoken reward train` makes such models out of
    preferences, labelled spans or labelled steps.
    """

    path: str
    """Folder of the model."""
    against: str = "prompt"
    """What it reads before the text, if it was trained so: `prompt`, `reference` or a column named in `task.info`."""

    def token_values(self, sample: Sample) -> list[float]:
        values = [0.0] * len(sample.tokens)
        if not values or not sample.text:
            return values
        for (start, stop), value in scorer_of(self.path).values(sample.text, self._before(sample)):
            for token, share in spread(sample.aligned, start, stop, value):
                values[token] += share
        return values

    def readings(self, sample: Sample) -> list[Reading]:
        """One per piece of the text that the model sees at once."""
        if not sample.text:
            return []
        return scorer_of(self.path).readings(sample.text, self._before(sample), sample.aligned)

    def _before(self, sample: Sample) -> str:
        """What the model reads before the text."""
        return "\n\n".join(other_texts(sample, self.against, "token_model")) if scorer_of(self.path).context else ""
