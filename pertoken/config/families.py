"""Families of tasks by name: what is asked, where data have it, what is paid, and what is measured.

A family is not a class here. It is a row: questions over names of its own with the columns that data of the kind have
them in, and settings of rewards, sampling and evaluation. `task: {family: summarization, path: articles.jsonl}` stands
for the keys of its row, every key can be set otherwise beside it, and the resolved configuration that is saved with a
run names all of them. To add a family that is made of what exists: one more `Family` below.

`$target_language` and `$tokenizer` in settings are filled in last, when it is known which language is written.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pertoken.answers import UNANSWERABLE
from pertoken.errors import ConfigError, closest
from pertoken.text_metrics import bleu_tokenizer

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One thing that a family asks."""

    ask: str
    """Over the names."""
    names: tuple[str, ...]
    """What a row must have; the last one is the answer, the first one the text that the question is about."""
    columns: tuple[str, ...]
    """Where data have them, each a list of columns in the order of the names, written with spaces between."""
    cue: str = ""
    """What stands behind it where the prompt is plain text, for models that go on with a text."""

    def layouts(self, style: str, fill: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """How rows are read: its own names first, then the others."""
        for columns in (" ".join(self.names), *self.columns):
            yield self.layout(dict(zip(self.names, _filled(columns, fill).split(), strict=True)), style, fill)

    def layout(self, columns: Mapping[str, str], style: str, fill: Mapping[str, str]) -> dict[str, Any]:
        """The same of one list of columns, by name."""
        ask = _filled(self.ask, fill) if style != "bare" else "\n".join(f"{{{name}}}" for name in self.names[:-1])
        for name in self.names:
            ask = ask.replace(f"{{{name}}}", f"{{{columns[name]}}}")
        cue = _filled(self.cue, fill) if style == "plain" else ""
        return {"prompt": _put(ask + cue, style), "answer": columns[self.names[-1]], "source": columns[self.names[0]]}


def _put(text: str | None, style: str) -> Any:
    """A prompt in the style that is asked for."""
    return [{"role": "user", "content": text}] if style == "chat" and text is not None else text


@dataclass(frozen=True)
class Family:
    """One family of tasks."""

    title: str
    about: str
    """What it is for and what to look at, in Markdown."""
    questions: tuple[Question, ...]
    settings: Settings
    """Sections and keys of the configuration that it sets, `task` aside."""
    style: str = "chat"
    """How it asks unless a task says otherwise: `chat`, as a message of the user, `plain`, as text to go on from, or
    `bare`, the columns alone."""
    no_answer: str | None = None
    """What the answer is where a row has none; None: such rows are unusable."""
    further: tuple[Settings, ...] = ()
    """Layouts that are no questions of its own."""
    needs: str = ""
    """What has to be installed for its rewards."""

    def layouts(self, style: str, fill: Mapping[str, str]) -> list[dict[str, Any]]:
        """All ways in which a row is read, the first that fits counts: questions, then what is ready to be asked."""
        asked = [layout for question in self.questions for layout in question.layouts(style, fill)]
        texts = [{"prompt": "{prompt}", "answer": name} for name in ("completion", "response", "reference", "answer")]
        ready = [*CONVERSATIONS, *texts, *self.further]
        return [*asked, *({**layout, "prompt": _put(layout.get("prompt"), style)} for layout in ready)]


CONVERSATIONS = (
    {"messages": "prompt", "answer": "completion"},
    {"messages": "prompt", "answer": "response"},
    {"messages": "messages"},
    {"messages": "conversations"},
    {"messages": "conversation"},
    {"messages": "dialog"},
)
"""Where data have conversations: as TRL, ShareGPT and others name them."""

UNFINISHED = {"name": "length", "unfinished_cost": 0.1}
NO_LOOPS = {"name": "repetition", "cost": 0.05}


def _sampling(tokens: int, metric: str, further: Sequence[str] = (), **evaluation: Any) -> dict[str, Any]:
    """Samples of so many tokens at most, in training and held out, and what the latter are measured by."""
    greedy = {"temperature": 0.0, "max_new_tokens": tokens}
    return {
        "rollout": {"sampling": {"max_new_tokens": tokens}},
        "evaluation": {"metric": metric, "further": list(further), "sampling": greedy} | evaluation,
    }


FAMILIES: Mapping[str, Family] = MappingProxyType({
    "translation": Family(
        title="Translation",
        about="`task.source_language` and `task.target_language` are codes (`en`, `de`, `zh` ...): the prompt names "
        "both languages, pairs `{translation: {en: ..., de: ...}}` are read by them, and BLEU and TER cut words "
        "as the target is written (`zh`, `ja-mecab`, `ko-mecab`, else `13a`). Models that do nothing but translate "
        "(Marian, NLLB) want `style: bare`, and those of many languages "
        "[`policy.languages`](#models-that-read-and-write), too. COMET, in an environment of its own, is a held-out "
        "metric through [`evaluation.beside`](#measured-beside): `{name: comet, python: comet-env/bin/python}`.",
        questions=(
            Question(
                "Translate from $from to $to:\n\n{source}",
                ("source", "target"),
                (
                    "translation.$source_language translation.$target_language",
                    "$source_language $target_language",
                    "src tgt",
                    "sentence translation",
                ),
                cue="\n\n$to:",
            ),
        ),
        settings={
            "rewards": [
                {"name": "bleu", "weight": 0.5, "tokenize": "$tokenizer"},
                {"name": "chrf", "weight": 0.5},
                UNFINISHED,
                NO_LOOPS,
            ],
            **_sampling(64, "chrf", ["ter", "corpus_ter"], language="$target_language"),
        },
    ),
    "summarization": Family(
        title="Summarisation",
        about="Coverage and density tell how much of a summary is copied, compression how much shorter it is: a rise "
        "of ROUGE with a density that doubles is copying. Faithfulness by entailment, and BERTScore, are "
        "held-out metrics through [`evaluation.beside`](#measured-beside): `{name: entailment, against: source, "
        "model: ...}`.",
        questions=(
            Question(
                "Summarise the text in one or two sentences.\n\n{document}",
                ("document", "summary"),
                (
                    "article highlights", "article summary", "article abstract", "dialogue summary", "text summary",
                    "body headline", "body summary", "maintext title",
                ),
                cue="\n\nSummary:",
            ),
        ),
        settings={
            "rewards": [
                {"name": "rouge_1", "weight": 0.33},
                {"name": "rouge_2", "weight": 0.33},
                {"name": "rouge_l", "weight": 0.34},
                {"name": "length", "max_words": 60, "cost": 0.01, "unfinished_cost": 0.1},
                NO_LOOPS,
            ],
            **_sampling(64, "rouge_l", ["rouge_lsum", "coverage", "density", "compression"]),
        },
    ),
    "qa": Family(
        title="Question answering",
        about="With or without a context. Where the data have an empty list of answers (SQuAD 2.0), the answer is "
        f"`{UNANSWERABLE}`; `abstained` tells how often the model says so or that it does not know, "
        "`abstention_right` how often it was right to say so or not to. `answer_f1` costs 0.1 for an answer that is "
        "wrong and not withheld.",
        questions=(
            Question(
                "Read the text and answer the question in a few words of the text. If the text has no answer, say: "
                f"{UNANSWERABLE}\n\n{{context}}\n\nQuestion: {{question}}",
                ("context", "question", "answer"),
                ("context question answers.text", "context question answers", "passage question answer",
                 "context query answer", "paragraph question answer"),
                cue="\nAnswer:",
            ),
            Question(
                f"Answer the question in a few words. If you do not know, say: {UNANSWERABLE}\n\n"
                "Question: {question}",
                ("question", "answer"),
                ("question answers.text", "question answers", "question answer.value", "query answer"),
                cue="\nAnswer:",
            ),
        ),
        settings={
            "rewards": [
                {"name": "answer_f1", "wrong": 0.1},
                {"name": "length", "max_words": 12, "cost": 0.02, "unfinished_cost": 0.1},
            ],
            **_sampling(24, "answer_f1", ["abstained", "abstention_right"]),
        },
        no_answer=UNANSWERABLE,
    ),
    "generation": Family(
        title="Generation",
        about="Stories, reviews and other texts that go on from an opening. Held-out texts are sampled, since greedy "
        "ones say too little of what the model writes; `self_bleu` and `distinct_2` tell whether they are all "
        "alike, and `mauve` (set `evaluation.further`, extra `semantics`) how close they are to the references as "
        "a distribution, of a few hundred items. For a wanted feeling add a classifier, `{name: classifier, model: "
        "my_sentiment, label: positive, granularity: sentence}`; for fluency as another model has it "
        "`evaluation.beside: [{name: "
        "perplexity, model: ...}]`. Of data with one column `text`, its first 16 words are the prompt and the "
        "rest is the reference.",
        questions=(
            Question("{opening}", ("opening", "continuation"), ()),
        ),
        settings={
            "rewards": [
                {"name": "distinct", "n": 2, "weight": 0.5},
                {"name": "repetition", "cost": 0.1},
                {"name": "harper", "cost": 0.1},
                {"name": "length", "min_words": 20, "unfinished_cost": 0.1},
            ],
            **_sampling(96, "distinct_2", ["self_bleu"], sampling={
                "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 96,
            }),
        },
        style="plain",
        further=({"prompt": "{text}", "opening": 16}, {"prompt": "{prompt}"}),
        needs="the extra `grammar`",
    ),
    "dialogue": Family(
        title="Dialogue",
        about="The column `messages` goes through the chat template of the model; the last turn, of the assistant, is "
        "the answer, what comes before it is read and not learnt. Conversations as `conversations` (`from`, "
        "`value`) or as a list of texts in turn are read too. Rewards pay each token of the reply; a reward of "
        "yours finds the turns in `sample.item.prompt`. `self_bleu` and `distinct_2` tell of replies that would "
        "do for anything.",
        questions=(
            Question(
                "{context}", ("context", "response"), ("history response", "history reply", "question response"),
            ),
        ),
        settings={
            "rewards": [
                {"name": "meteor"},
                {"name": "length", "min_words": 3, "max_words": 40, "cost": 0.02, "unfinished_cost": 0.1},
                NO_LOOPS,
            ],
            **_sampling(64, "rouge_l", ["self_bleu"]),
        },
        further=({"messages": "history", "answer": "response"}, {"messages": "context", "answer": "response"}),
    ),
    "writing": Family(
        title="Writing aid",
        about="Headlines, abstracts, outlines, reviews and rewriting, each asked for by the columns of a row; rows of "
        "several kinds may stand in one file. Harper finds the mistakes of what is written, in English; for "
        "Chinese set `rewards` with `{name: rule_pack, pack: zh}` in its place.",
        questions=(
            Question("Write a headline for the text.\n\n{text}", ("text", "headline"),
                     ("article headline", "text title"), cue="\n\nHeadline:"),
            Question("Write the abstract of the text.\n\n{text}", ("text", "abstract"), ("article abstract",),
                     cue="\n\nAbstract:"),
            Question("Write an outline of a text on: {topic}", ("topic", "outline"), ("title outline", "text outline"),
                     cue="\n\nOutline:"),
            Question("Write a short review of: {product}", ("product", "review"), ("title review",), cue="\n\nReview:"),
            Question("Rewrite the text without mistakes, and keep what it says.\n\n{draft}", ("draft", "rewrite"),
                     ("sentence corrections", "input output", "src tgt", "incorrect correct"), cue="\n\nRewritten:"),
        ),
        settings={
            "rewards": [
                {"name": "rouge_l"},
                {"name": "harper", "weight": 0.5, "cost": 0.1},
                UNFINISHED,
                NO_LOOPS,
            ],
            **_sampling(96, "rouge_l", ["rouge_lsum", "compression"]),
        },
        needs="the extra `grammar`",
    ),
    "reasoning": Family(
        title="Reasoning",
        about="Solutions as GSM8K has them, the final answer behind `####`; also `\\boxed{}`, and `answer is`. "
        "`final_answer` pays the right one on its own characters, numbers compared as numbers; `steps` checks "
        "each sum on the way (`16 * .5 = 8`) and pays or costs on its result, so that a slip is blamed where it "
        "happened. It knows nothing of the question: watch `right_steps` rise without `final_answer`.",
        questions=(
            Question(
                "Solve the problem step by step. Write each calculation as a line such as 2 * 3 = 6, and the final "
                "answer in a last line behind ####.\n\n{question}",
                ("question", "answer"),
                ("problem solution", "problem answer", "question solution", "query response"),
                cue="\n\nSolution:\n",
            ),
        ),
        settings={
            "rewards": [
                {"name": "final_answer"},
                {"name": "steps", "reward": 0.05, "cost": 0.1},
                UNFINISHED,
                NO_LOOPS,
            ],
            **_sampling(192, "final_answer", ["right_steps"]),
        },
    ),
})  # fmt: skip
"""The table of families, in the order of docs/tasks.md."""


LANGUAGES = MappingProxyType({
    "ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "lt": "Lithuanian", "lv": "Latvian", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
})  # fmt: skip
"""Names of languages, as prompts call them; a code that is not here stands for itself."""


def settings_of(task: Settings) -> dict[str, Any]:
    """The sections that the family of a task section sets, `task` aside; none without a family."""
    name = task.get("family")
    return {} if name is None else copy.deepcopy(dict(_family(str(name)).settings))


def read_by(task: Settings) -> dict[str, Any]:
    """`task` with what its family says of reading rows, where it does not say so itself.

    `columns` rename those of the family's first question. With a prompt of its own a task has no layouts.
    """
    if task.get("family") is None or task.get("layouts"):
        return dict(task)
    family, fill = _family(str(task["family"])), _fill(task)
    question, found = family.questions[0], dict(task)
    renamed = dict(task.get("columns") or {})
    if unknown := [name for name in renamed if name not in question.names]:
        raise ConfigError(
            f"task.columns.{unknown[0]}: {task['family']} has no such; {closest(unknown[0], question.names)}"
        )
    if family.no_answer is not None:
        found.setdefault("no_answer", family.no_answer)
    if task.get("prompt") is not None:
        return {"answer": renamed.get(question.names[-1], question.names[-1])} | found
    style = str(task.get("style") or family.style)
    if "answer" in task:
        renamed.setdefault(question.names[-1], task["answer"])
    if renamed:
        columns = {name: renamed.get(name, name) for name in question.names}
        return found | {"layouts": [question.layout(columns, style, fill)]}
    return found | {"layouts": family.layouts(style, fill)}


def bound(values: Any, task: Settings) -> Any:
    """`values` with the marks in them filled in by what `task` says of languages."""
    if isinstance(values, dict):
        return {key: bound(value, task) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [bound(value, task) for value in values]
    marks = {"$target_language": task.get("target_language"), "$tokenizer": bleu_tokenizer(task.get("target_language"))}
    return marks.get(values, values) if isinstance(values, str) else values


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"task.family: unknown name {name[:60]!r}; {closest(name, FAMILIES)}")
    return FAMILIES[name]


def _fill(task: Settings) -> dict[str, str]:
    """What the marks in questions stand for."""
    codes = {f"{side}_language": str(task.get(f"{side}_language") or side) for side in ("source", "target")}
    named = {side: LANGUAGES.get(codes[key], codes[key]) for side, key in zip(("from", "to"), codes, strict=True)}
    return codes | named


def _filled(text: str, fill: Mapping[str, str]) -> str:
    for mark, value in sorted(fill.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(f"${mark}", value)
    return text
