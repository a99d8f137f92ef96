"""Families of tasks: what a name stands for, what wins over it, what it reads, and that its recipe trains."""

import json
from pathlib import Path

import pytest
import yaml

from pertoken.assembly import build_rewards, build_task
from pertoken.config import FileTask, RunConfig, load_config
from pertoken.config.families import FAMILIES, LANGUAGES
from pertoken.errors import ConfigError
from pertoken.jobs.run import train
from pertoken.tasks.base import SPLITS

ROOT = Path(__file__).parents[1]
every_family = pytest.mark.parametrize("name", FAMILIES)

ROWS = {
    "translation": [
        {"source": "See spot {k}.", "target": "Sieh Punkt {k}."},
        {"translation": {"en": "See spot {k}!", "de": "Sieh Punkt {k}!"}},
        {"en": "Run {k}", "de": "Lauf {k}"},
        {"src": "Go {k}", "tgt": "Geh {k}"},
        {"prompt": "Say {k}", "reference": "Sag {k}", "source": "corpus/{k}"},
    ],
    "summarization": [
        {"document": "Long {k}. It is.", "summary": "Long {k}."},
        {"article": "Far {k}. So.", "highlights": "Far {k}."},
        {"dialogue": "A: Hi {k}", "summary": "Hi."},
        {"prompt": "Sum up {k}", "completion": "Up {k}"},
    ],
    "qa": [
        {"context": "It is {k}.", "question": "What?", "answer": "{k}"},
        {"context": "It was {k}.", "question": "What?", "answers": {"text": ["{k}", "day {k}"], "answer_start": [0]}},
        {"context": "Nothing {k}.", "question": "What?", "answers": {"text": [], "answer_start": []}},
        {"question": "Who {k}?", "answer": ["{k}", "me"]},
        {"prompt": "Which {k}?", "reference": "{k}"},
    ],
    "generation": [
        {"opening": "Once {k}", "continuation": "there was"},
        {"text": "{k} " + "and so on " * 10},
        {"prompt": "Then {k}"},
    ],
    "dialogue": [
        {"messages": [{"role": "user", "content": "Hi {k}"}, {"role": "assistant", "content": "Hello."}]},
        {"conversations": [{"from": "human", "value": "Ho {k}"}, {"from": "gpt", "value": "Hm."}]},
        {"dialog": ["Well {k}?", "Well."]},
        {"context": "A: Yes {k}\nB:", "response": "No."},
        {"history": ["So {k}?"], "response": "So."},
    ],
    "writing": [
        {"text": "News {k}.", "headline": "New {k}"},
        {"text": "Study {k}.", "abstract": "We study {k}."},
        {"topic": "Bees {k}", "outline": "1. Bees"},
        {"product": "Pen {k}", "review": "It writes."},
        {"sentence": "He go {k}.", "corrections": ["He goes {k}.", "He went {k}."]},
    ],
    "reasoning": [
        {"question": "{k} + 1?", "answer": "{k} + 1 = ?\n#### 4"},
        {"problem": "{k} + 2?", "solution": "\\boxed{4}"},
        {"messages": [{"role": "user", "content": "{k} + 3?"}, {"role": "assistant", "content": "#### 4"}]},
    ],
}  # fmt: skip
"""Rows of each usual shape; `{k}` is their number."""


def numbered(value, k):
    if isinstance(value, dict):
        return {key: numbered(inner, k) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbered(inner, k) for inner in value]
    return value.replace("{k}", str(k)) if isinstance(value, str) else value


def write(folder, name, count):
    """A file of `count` rows, of all shapes in turn."""
    rows = [numbered(ROWS[name][k % len(ROWS[name])], k) for k in range(count)]
    path = folder / "my_data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def items_of(config):
    task = build_task(config.task)
    return [item for split in SPLITS for item in task.items(split)]


def section(name, path="x.jsonl", **keys):
    languages = {"source_language": "en", "target_language": "de"} if name == "translation" else {}
    return {"family": name, "path": str(path)} | languages | keys


@every_family
def test_a_name_stands_for_its_settings_in_python_files_and_overrides(name, tmp_path):
    task = section(name)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"task": task}))
    config = RunConfig(task=task)
    overrides = [f"task.{key}={value}" for key, value in task.items()]
    assert load_config([tmp_path / "run.yaml"]) == config == load_config([], overrides[::-1])
    assert RunConfig(task=FileTask(**task)) == config
    settings = FAMILIES[name].settings
    assert [part.name for part in config.rewards] == [part["name"] for part in settings["rewards"]]
    assert config.evaluation.metric == settings["evaluation"]["metric"]
    assert config.rollout.sampling.max_new_tokens == config.evaluation.sampling.max_new_tokens
    assert "$" not in config.to_yaml()
    build_rewards(config.rewards)


@every_family
def test_what_is_saved_names_every_value_and_reads_back_as_itself(name, tmp_path):
    config = load_config([], [f"task={json.dumps(section(name))}"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config([tmp_path / "config.yaml"], ["seed=3"]) == config.model_copy(update={"seed": 3})
    assert len(yaml.safe_load(config.to_yaml())["task"]["layouts"]) == len(config.task.layouts) > 3


@every_family
@pytest.mark.parametrize("style", ["chat", "plain", "bare"])
def test_every_usual_shape_is_read_whatever_the_style(name, style, tmp_path):
    items = items_of(RunConfig(task=section(name, write(tmp_path, name, 30), style=style)))
    assert len(items) == 30
    chats = [not isinstance(item.prompt, str) for item in items]
    assert all(chats) if style == "chat" else not all(chats)
    assert all(item.answer for item in items) or name == "generation"


def test_what_is_set_beside_it_wins():
    config = RunConfig(task=section("qa"), rewards=[{"name": "chrf"}], evaluation={"metric": "exact_match"})
    assert [part.name for part in config.rewards] == ["chrf"]
    assert (config.evaluation.metric, config.evaluation.further) == ("exact_match", ("abstained", "abstention_right"))
    assert config.rollout.sampling.max_new_tokens == 24


def test_a_family_wins_over_the_files_before_and_an_algorithm_beside_it_stays(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("rewards: [{name: chrf}]\nalgorithm: grpo\n")
    two.write_text(yaml.safe_dump({"task": section("qa")}))
    config = load_config([one, two], ["rollout.sampling.max_new_tokens=9"])
    assert config.rewards[0].name == "answer_f1"
    assert (config.credit.type, config.rollout.sampling.max_new_tokens) == ("group_relative", 9)


def test_a_prompt_of_ones_own_takes_the_place_of_all_layouts():
    task = RunConfig(task=section("summarization", prompt="TL;DR {document}")).task
    assert (task.layouts, task.prompt, task.answer) == ((), "TL;DR {document}", "summary")
    task = RunConfig(task=section("qa", prompt="{q}", answer="a")).task
    assert (task.layouts, task.answer, task.no_answer) == ((), "a", "unanswerable")


def test_columns_rename_what_the_question_is_about(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "B", "tldr": "T", "document": "no", "summary": "no"}))
    task = section("summarization", tmp_path / "rows.jsonl", columns={"document": "body"}, answer="tldr")
    (item,) = items_of(RunConfig(task=task))
    assert (item.prompt[0]["content"][-2:], item.answer, item.info["source"]) == ("\nB", "T", "B")
    with pytest.raises(ConfigError, match=r"task.columns.documnt: summarization has no such; did you mean 'document'"):
        load_config([], [f"task={json.dumps(section('summarization', columns={'documnt': 'body'}))}"])


def test_the_languages_of_a_translation_are_named_read_and_cut_by(tmp_path):
    row = {"translation": {"en": "Hello", "zh": "你好"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    overrides = ["task.target_language=zh", f"task.path={tmp_path / 'rows.jsonl'}"]
    config = load_config([ROOT / "recipes" / "translation.yaml"], [*overrides, "task.style=chat"])
    assert config.rewards[0].parameters["tokenize"] == "zh"
    assert config.evaluation.language == "zh"
    (item,) = items_of(config)
    assert item.prompt[0]["content"] == "Translate from English to Chinese:\n\nHello"
    assert (item.answer, item.info["source"]) == ("你好", "Hello")
    assert RunConfig(task=section("translation", target_language="xx")).evaluation.language == "xx"
    assert "to xx:" in str(RunConfig(task=section("translation", target_language="xx")).task.layouts[0].prompt)
    assert LANGUAGES["de"] == "German"


def test_questions_without_an_answer_are_answered_so(tmp_path):
    items = items_of(RunConfig(task=section("qa", write(tmp_path, "qa", 30))))
    assert [item.answer for item in items].count("unanswerable") == 6


def test_an_unknown_family_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"task.family: unknown name 'summarisation'; did you mean 'summarization'"):
        load_config([], ["task.family=summarisation", "task.path=x.jsonl"])


def test_tasks_of_a_mixture_are_read_by_their_families(tmp_path):
    tasks = {name: section(name, write_to(tmp_path / name, name)) for name in ("qa", "summarization")}
    config = RunConfig(task={"tasks": tasks}, rewards=[{"name": "rouge_1"}])
    assert {item.task for item in items_of(config)} == {"qa", "summarization"}
    assert config.evaluation.metric == "rouge_l"
    assert load_config([], [f"task={json.dumps({'tasks': tasks})}", "rewards=[{name: rouge_1}]"]) == config


def write_to(folder, name):
    folder.mkdir()
    return write(folder, name, 20)


SMALL = [
    "policy.precision=float32", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.redraws=0",
    "rollout.max_prompt_tokens=90", "rollout.sampling.max_new_tokens=6", "evaluation.sampling.max_new_tokens=6",
    "evaluation.items=2", "evaluation.every=1", "stop.steps=1", "update.warmup_steps=0", "task.style=bare",
]  # fmt: skip


@every_family
def test_the_recipe_trains_and_measures(name, model_folder, tmp_path):
    """A tiny random model, on rows of every shape; asked in words, a prompt has more bytes than its context."""
    config = load_config(
        [ROOT / "recipes" / f"{name}.yaml"],
        [*SMALL, f"policy.model={model_folder}", f"task.path={write(tmp_path, name, 60)}", f"folder={tmp_path / 'run'}"]
        + ["task.augment.word_dropout=0.3"] * (name == "summarization"),
    )
    result = train(config)
    assert result.reason == "made all 1 steps"
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    settings = FAMILIES[name].settings["evaluation"]
    measured = rows[-1]["metrics"]
    assert {settings["metric"], *settings["further"]} <= set(measured)
    assert [row["main"] for row in rows] == [settings["metric"]] * 2
