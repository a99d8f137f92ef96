"""From `task.augment` to the ways in which it says prompts otherwise; back-translation by two models."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pertoken.config import AugmentConfig, BackTranslationConfig
from pertoken.machine.cache import cache_folder, keep
from pertoken.policy.model import Policy, load_model
from pertoken.policy.scoring import head_logits
from pertoken.rewards.align import align, sentence_spans
from pertoken.rollout.collect import collect
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.tasks.augment import Augmentation, Rewrite, synonyms, word_dropout, wordnet
from pertoken.tasks.base import PromptTemplate
from pertoken.types import Item

MAX_TOKENS = 128
"""Of a translated sentence."""


def build_augmentation(config: AugmentConfig) -> Augmentation:
    """What `config` asks for; data and models that it needs are found here or at the first text."""
    rewrites: dict[str, Rewrite] = {}
    if config.word_dropout:
        rewrites["word_dropout"] = word_dropout(config.word_dropout)
    if config.synonyms:
        rewrites["synonyms"] = synonyms(config.synonyms, wordnet())
    if config.back_translation is not None:
        rewrites["back_translation"] = back_translation(config.back_translation)
    templates = (p if isinstance(p, str) else [message.model_dump() for message in p] for p in config.prompts)
    return Augmentation(rewrites, tuple(map(PromptTemplate, templates)), config.share, config.seed)


def back_translation(config: BackTranslationConfig) -> Rewrite:
    """Texts translated there and back, sentence by sentence, greedily; seeds change nothing.

    Edunov et al. 2018, https://aclanthology.org/D18-1045, and Sugiyama & Yoshinaga 2019 for paraphrase. What came of a
    text is kept in the cache folder, so that a run that goes on asks no model again.
    """

    def rewrite(texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        known = {text: _known(_place(config, text)) for text in texts}
        missing = [text for text, rewritten in known.items() if rewritten is None]
        sentences = {text: [text[start:stop] for start, stop in sentence_spans(text)] for text in missing}
        said = [sentence for parts in sentences.values() for sentence in parts]
        for model in (config.there, config.back) if said else ():
            said = translate(model, config.prompt, said)
        remaining = iter(said)
        for text, parts in sentences.items():
            known[text] = " ".join(next(remaining) for _ in parts)
            keep(_place(config, text), json.dumps(known[text]))
        return [str(known[text]) for text in texts]

    return rewrite


def _known(place: Path) -> str | None:
    """What was kept there; None if nothing was, or nothing that can be read."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def translate(model: str, prompt: str, sentences: Sequence[str]) -> list[str]:
    """What the model makes of each sentence, in the order given."""
    policy = Policy(*load_model(model))
    engine = NativeEngine(policy.model, policy.tokenizer, head_logits=head_logits, context_length=policy.context_length)
    template = PromptTemplate(prompt)
    greedy = Sampling(temperature=0.0, max_new_tokens=MAX_TOKENS)
    controls = Controls.resolve(greedy, policy.tokenizer, policy.eos_ids)
    asked = [str(template.render({"text": sentence})) for sentence in sentences]
    chats = bool(policy.tokenizer.chat_template)
    items = [Item(str(k), ({"role": "user", "content": text},) if chats else text) for k, text in enumerate(asked)]
    episodes = collect(engine, items, policy.tokenizer, controls)
    return [align(e.tokens[e.prompt_length :], policy.tokenizer).text.strip() for e in episodes]


def _place(config: BackTranslationConfig, text: str) -> Path:
    digest = hashlib.sha256(json.dumps([config.there, config.back, config.prompt, text]).encode()).hexdigest()
    return cache_folder() / "back-translation" / digest[:2] / f"{digest}.json"
