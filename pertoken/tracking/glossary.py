"""What every logged name means: the one place that knows. `docs/metrics.md` and the report are made from it.

A name with a placeholder stands for a family: `reward/<part>` is found for `reward/rouge_l`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Term:
    """One name of the glossary."""

    meaning: str
    formula: str
    """Unit or formula; `a` runs over the action tokens of the step, `e` over its episodes."""
    label: str = ""
    """How a title should name it, if not by its own name."""
    better: Literal["higher", "lower", "either"] = "either"
    """Which direction is good news, as far as one metric can tell."""
    scale: Literal["signed", "magnitude", "around_one"] = "signed"
    """For streams: coloured around 0, by distance from 0, or around 1."""

    @property
    def explanation(self) -> str:
        """Meaning and formula in one line."""
        return f"{self.meaning.rstrip('.')} ({self.formula})"


METRICS: dict[str, Term] = {
    "loss/policy": Term("The policy's objective, as minimised.", "aggregate over a of the surrogate loss"),
    "loss/value": Term("Error of the value head against its targets.", "aggregate over a of ½ (V − return)²"),
    "reward/<part>": Term("One named part of the reward, weighted.", "mean over e of Σ part"),
    "reward/total": Term("The reward: all parts together.", "mean over e of Σ reward", better="higher"),
    "weight/<part>": Term("Weight of a part in this step, where it moves, is clipped or normalised.", "factor"),
    "judge_spent/<part>": Term("What a judge has cost in this run, by its prices.", "money"),
    "judge_requests/<part>": Term("Requests that a judge has answered in this run.", "requests"),
    "judge_known_share/<part>": Term("Samples of the step whose verdict was known already.", "share of texts, 0 to 1"),
    "task_reward/<task>": Term("The reward of one task of a mixture.", "mean over its e of Σ reward", better="higher"),
    "task_length/<task>": Term("Tokens per completion of one task.", "mean over its e, tokens"),
    "task_kl/<task>": Term("How far the policy is from the reference on one task.", "mean over its e of Σ KL, nats"),
    "task_share/<task>": Term("Prompts of the step that are of this task.", "share, 0 to 1"),
    "class_share/<class>": Term("Prompts of the step that are of this class (`task.balance`).", "share, 0 to 1"),
    "task_change/<task>": Term(
        "How fast the reward of the task rises or falls, which its share follows (`task.progress`).",
        "running mean of the change per step, in standard deviations of its reward",
    ),
    "curriculum/<limit>": Term(
        "What the curriculum gives this step: tokens of the longest prompt (`prompt_tokens`), highest difficulty "
        "(`hardest`), share of the training items that are let in (`items`), tokens of a completion (`new_tokens`). Of "
        "a mixture with the name of its task behind.",
        "in units of its own",
    ),
    "raw/<part>": Term(
        "The same part before it was clipped, normalised and weighed.", "mean over the e with an opinion of Σ part"
    ),
    "clipped/<part>": Term(
        "Values of the part that lay outside of its `clip`.", "share of values other than 0, or of e, 0 to 1"
    ),
    "abstained/<part>": Term("Completions that the part has no opinion on; absent if it has one on all.", "share of e"),
    "beside/<name>": Term(
        "A metric that is measured on the samples of the step and never paid (`guards.beside`).",
        "mean over the e with an opinion of Σ metric",
    ),
    "errors/<part>": Term(
        "Completions that the part failed on, within its `max_failed_share`; absent if there is none.", "count"
    ),
    "prime/loss": Term(
        "Of a process reward that learns (`prime`): how badly it told right answers from wrong, before its update.",
        "mean over e of −log σ(±β Σ q)",
        better="lower",
    ),
    "prime/accuracy": Term(
        "Answers that it told right; one that it does not know counts half.", "share of e, 0 to 1", better="higher"
    ),
    "kl/reference": Term(
        "How far the policy that wrote the samples is from the reference model.", "mean over a, nats per token"
    ),
    "kl/sequence": Term("The same distance for whole completions.", "mean over e of Σ KL, nats"),
    "kl/coefficient": Term("Weight of the KL penalty in this step.", "per nat"),
    "entropy": Term("How undecided the policy is.", "mean over a of −Σ p log p, nats"),
    "drift/mean": Term(
        "Check of the token maths: the same weights sampled and scored the token, so the ratio is 1 before the first "
        "update and this is 0 but for number formats.",
        "mean over a of |log p_scored − log p_sampled|, nats",
    ),
    "drift/max": Term("The same at the worst token.", "max over a of |log p_scored − log p_sampled|, nats"),
    "staleness": Term(
        "Updates that the policy had made since the tokens of this step were sampled (`rollout.ahead`).", "updates"
    ),
    "replay/rows": Term("Samples of earlier steps that this step learns from again (`rollout.replay`).", "count"),
    "replay/staleness": Term(
        "Updates that the policy has made since they were sampled.", "mean over replayed e of versions"
    ),
    "replay/effective_share": Term(
        "What their importance weights leave of them; small where the policy has moved far.",
        "(mean w)² / mean w² over their a, 0 to 1",
    ),
    "importance/clipped_share": Term(
        "Tokens whose importance weight was cut at its limit, or left out.",
        "share of a, 0 to 1",
        "importance weight cut",
    ),
    "update/kl": Term(
        "How far the update had moved the policy before its last optimiser step (`stop_kl`, `target_kl`).",
        "mean over a of k3, nats per token",
    ),
    "trust/step_share": Term(
        "How much of the natural-gradient step was taken (`update.trust_region`): 0 if the line search refused all.",
        "share of the step that reaches the KL bound to second order, 0 to 1",
    ),
    "trust/kl": Term("How far that step moved the policy.", "mean over a of KL(before || after), nats per token"),
    "distance/initial": Term(
        "How far the weights are from those before training (`update.l2_to_initial`).", "√ Σ (w − w₀)²"
    ),
    "update/stopped": Term("The update of this step ended early (`update.stop_kl`).", "1 if it did, else 0"),
    "groups/redrawn": Term(
        "Groups whose samples all earned the same, replaced by those of other prompts (`rollout.redraws`).", "groups"
    ),
    "clip/share": Term(
        "Tokens that the surrogate clipped: they no longer move the policy.", "share of a, 0 to 1", "clipped ratio"
    ),
    "advantage/mean": Term("Mean advantage; near 0 when it is whitened.", "mean over a"),
    "advantage/std": Term("Spread of the advantages; 0 means that nothing is learnt.", "standard deviation over a"),
    "value/error": Term("How far the critic is off.", "√ of the mean over a of (V − return)²"),
    "value/explained_variance": Term(
        "Share of the returns' variance that the critic predicts; 1 is perfect, below 0 is worse than a constant.",
        "1 − Var(return − V) / Var(return)",
        better="higher",
    ),
    "answer/nats": Term(
        "How odd the policy finds the answers in the data that it learns (of pairs the chosen ones).",
        "mean over their a of −log p, nats",
        better="lower",
    ),
    "preference/chosen": Term(
        "What chosen or desirable answers earn by the implicit reward.", "mean over them of Σ score"
    ),
    "preference/rejected": Term("What the other answers earn.", "mean over them of Σ score"),
    "preference/margin": Term("How much more the chosen answer of a pair earns.", "mean over pairs", better="higher"),
    "preference/accuracy": Term(
        "Pairs whose chosen answer earns more; a tie counts half.", "share of pairs, 0 to 1", better="higher"
    ),
    "completion/length": Term("Tokens per completion, sampled or given.", "mean over e, tokens"),
    "completion/terminated_share": Term(
        "Completions that ended by themselves; the others were cut off.", "share of e, 0 to 1"
    ),
    "completion/repetition": Term(
        "Runs of three tokens that came before in the same completion.", "mean over e of the share, 0 to 1"
    ),
    "completion/empty_share": Term("Completions without text.", "share of e, 0 to 1"),
    "alarm/<name>": Term(
        "A sign that the reward is gamed: length_drift, empty, endless, repetition, entropy_collapse, part_trade or "
        "over_optimised.",
        "1 while it lasts, else 0",
    ),
    "grad/norm": Term("Length of the gradient before it is clipped.", "√ Σ g²"),
    "grad/clipped_share": Term("Optimiser steps whose gradient was clipped.", "share of the step's updates, 0 to 1"),
    "balance/cosine": Term(
        "How far the gradients of tasks pull the same way (`update.balance`); below 0 they work against each other.",
        "mean over pairs of tasks of the cosine, −1 to 1",
    ),
    "balance/conflicts": Term("Pairs of tasks whose gradients work against each other.", "share of pairs, 0 to 1"),
    "learning_rate": Term("The optimiser's step size, after warm-up and schedule.", "per optimiser step"),
    "tokens/generated": Term("Tokens sampled in this step.", "count"),
    "tokens/beside": Term(
        "Tokens sampled beside those that the step learns from: greedy answers, rollouts from prefixes.", "count"
    ),
    "texts/beside": Term("Shortened texts that were scored to place the rewards anew (`credit.samples`).", "count"),
    "tokens/learnt": Term("Tokens of the answers in the data that this step learnt from.", "count"),
    "tokens/per_second": Term(
        "Tokens of completions, sampled or given, over the time of the whole step.", "tokens / s", better="higher"
    ),
    "time/step": Term("Time of a whole step, where its stages are not told apart (an arm by TRL).", "s"),
    "time/rollout": Term("Time to sample the completions.", "s"),
    "time/score": Term("Time to score them with the old and the reference policy.", "s"),
    "time/reward": Term("Time to compute rewards and credit.", "s"),
    "time/update": Term("Time of the forward and backward passes and the optimiser.", "s"),
    "memory/estimate": Term("What the run was expected to take at its height, before its first step.", "GB"),
    "memory/peak": Term("Most memory in use so far: of the GPU where there is one, else of the process.", "GB"),
    "portion/<name>": Term(
        "How much goes through at once where less than was set fits into memory: tokens of a `micro_batch`, tokens of "
        "a `scoring` pass, rows of a `rollout`.",
        "count",
    ),
    "skipped/updates": Term(
        "Updates left out because loss or gradient was not finite.", "count so far", better="lower"
    ),
}

HELD_OUT: dict[str, Term] = {
    "rouge_1": Term("Words shared with the reference answer.", "F1 of unigrams, 0 to 1", "ROUGE-1", "higher"),
    "rouge_2": Term("Word pairs shared with the reference answer.", "F1 of bigrams, 0 to 1", "ROUGE-2", "higher"),
    "rouge_l": Term("Longest common word sequence.", "F1 of its length, 0 to 1", "ROUGE-L", "higher"),
    "bleu": Term("N-gram precision with a brevity penalty, output by output.", "sacrebleu, 0 to 100", "BLEU", "higher"),
    "chrf": Term("Character n-grams shared with the reference answer.", "sacrebleu, 0 to 100", "chrF", "higher"),
    "exact_match": Term(
        "Answers that say the words of a reference and no others.",
        "share, without case, articles and punctuation",
        "exact match",
        "higher",
    ),
    "answer_f1": Term("Words that answer and reference share.", "F1 as in SQuAD, 0 to 1", "answer F1", "higher"),
    "rouge_lsum": Term("ROUGE-L line by line, the matches united.", "F1, 0 to 1", "ROUGE-Lsum", "higher"),
    "ter": Term("Edits that make the output a reference, per word of it.", "sacrebleu, in per cent", "TER", "lower"),
    "coverage": Term("Words of the output that are in pieces copied from the source.", "share, 0 to 1"),
    "density": Term(
        "How long the copied pieces are that its words stand in; long where sentences are copied whole.",
        "Σ length² / words",
    ),
    "compression": Term("How much longer the source is.", "words of the source / words"),
    "abstained": Term("Outputs that say that they do not know, or nothing.", "share, 0 to 1"),
    "abstention_right": Term(
        "Outputs that abstain where the reference does, and do not where it does not.",
        "share, 0 to 1",
        "right to abstain or not",
        "higher",
    ),
    "final_answer": Term(
        "Outputs with the final answer of a reference; numbers are compared as numbers.",
        "share, 0 to 1",
        "right final answers",
        "higher",
    ),
    "right_steps": Term(
        "Sums in the output that hold (`2 * 3 = 6`); 1 for an output without any.",
        "share, 0 to 1",
        "right sums",
        "higher",
    ),
    "beside/<name>": Term(
        "A reward that held-out outputs are measured by (`evaluation.beside`).", "Σ reward", "beside: <name>", "higher"
    ),
    "corpus_bleu": Term("The same, n-grams of all outputs together.", "sacrebleu", "BLEU, corpus", "higher"),
    "corpus_chrf": Term("The same, n-grams of all outputs together.", "sacrebleu", "chrF, corpus", "higher"),
    "corpus_ter": Term("TER, edits and words of all outputs together.", "sacrebleu", "TER, corpus", "lower"),
    "self_bleu": Term(
        "How alike the outputs are: BLEU of each against all others.",
        "mean over the first 100, 0 to 100",
        "self-BLEU",
        "lower",
    ),
    "mauve": Term(
        "How close the outputs are to the answers as two distributions over clusters of texts: of a few hundred items "
        "at least.",
        "area, 0 to 1",
        "MAUVE (sentence embeddings)",
        "higher",
    ),
    "words": Term("Length of the output.", "words"),
    "nats_per_token": Term("How odd the judge finds each output.", "mean −log p_ref, nats", better="lower"),
    "repetition": Term("Repeated n-grams in the output.", "share, 0 to 1", better="lower"),
    "distinct_<n>": Term("Different n-grams over all n-grams of the outputs.", "share, 0 to 1", "distinct-<n>"),
    "answer_logprob": Term(
        "How likely the reference answer (of pairs the chosen one) is to the policy.",
        "mean log p per token, nats",
        "answer log-prob",
        "higher",
    ),
    "preference_margin": Term("How much more the chosen answer earns.", "Σ score − Σ score", "margin", "higher"),
    "preference_accuracy": Term(
        "Pairs whose chosen answer earns more; a tie counts half.", "share, 0 to 1", "right pairs", "higher"
    ),
    "preference_score": Term(
        "What a desirable answer earns, and what an undesirable one loses.", "± Σ score", "score", "higher"
    ),
    "perplexity": Term(
        "How odd the judge (`evaluation.judge`, else the reference model) finds the outputs.",
        "exp of mean −log p_ref",
        better="lower",
    ),
    "since_start/<task>": Term(
        "How much better a task of a mixture is than before training, by the metric that it is followed by; that "
        "metric, on the items of the task alone, is `<metric>/<task>`.",
        "in its units; below 0 is worse",
        "since the start: <task>",
        "higher",
    ),
    "below_best/<task>": Term(
        "How much worse it is than at its best evaluation so far: what was forgotten.",
        "in its units, 0 at its best",
        "below its best: <task>",
        "lower",
    ),
}

STREAMS: dict[str, Term] = {
    "reward/<part>": Term("What this part of the reward gave this token.", "weighted reward", "reward: <part>"),
    "reward/total": Term("All reward of this token.", "sum of the parts", "reward: total"),
    "return": Term("Reward from this token on.", "Σ γᵏ r"),
    "value": Term("What the critic expected before this token was chosen.", "V(state)"),
    "advantage": Term(
        "How much better than expected this choice was: what the update follows.", "as the update uses it"
    ),
    "logprob": Term(
        "Log-probability under the policy that wrote it; 0 is certain.", "nats", "log-prob", scale="magnitude"
    ),
    "ref_logprob": Term("Log-probability under the reference.", "nats", "reference log-prob", scale="magnitude"),
    "kl": Term("Where the policy left the reference; below 0 the reference found it likelier.", "nats", "KL"),
    "entropy": Term("How undecided the policy was here.", "nats", scale="magnitude"),
    "ratio": Term("Probability after the update over before.", "p_new / p_old", scale="around_one"),
    "clipped": Term("1 if the surrogate clipped this token.", "0 or 1", scale="magnitude"),
    "importance_weight": Term(
        "Weight that corrects for sampling with slightly other numbers than scoring.",
        "p_scored / p_sampled, capped",
        scale="around_one",
    ),
    "value_error": Term("How far the critic was off at this token.", "return − V"),
}


def find(name: str, terms: Mapping[str, Term]) -> Term | None:
    """The term of a logged name, exact before family; None if the glossary does not know it.

    >>> find("reward/total", METRICS).meaning
    'The reward: all parts together.'
    >>> find("reward/brevity", METRICS).meaning
    'One named part of the reward, weighted.'
    >>> find("rouge_l/headlines", HELD_OUT).meaning  # of one task of a mixture
    'Longest common word sequence.'
    """
    if name in terms:
        return terms[name]
    found = next((term for family, term in terms.items() if _member(name, family) is not None), None)
    metric, _, task = name.partition("/")
    return find(metric, terms) if found is None and task and terms is HELD_OUT else found


def goodness(metric: str, value: float) -> float:
    """A held-out metric turned so that more is better; twice, it is the metric again.

    >>> goodness("rouge_l", 0.25), goodness("perplexity", 12.0)
    (0.25, -12.0)
    """
    term = find(metric, HELD_OUT)
    return -value if term is not None and term.better == "lower" else value


def label(name: str, terms: Mapping[str, Term]) -> str:
    """How a title names it.

    >>> label("rouge_l", HELD_OUT), label("reward/brevity", STREAMS), label("my_metric", HELD_OUT)
    ('ROUGE-L', 'reward: brevity', 'my metric')
    >>> label("rouge_l/headlines", HELD_OUT), label("below_best/headlines", HELD_OUT)
    ('ROUGE-L, headlines', 'below its best: headlines')
    """
    term = find(name, terms)
    if term is None or not term.label:
        return name.replace("_", " ")
    members = (_member(name, family) for family, candidate in terms.items() if candidate is term)
    place = next((part for part in members if part), "")
    metric, _, task = name.partition("/")
    if terms is HELD_OUT and task and not place:
        return f"{label(metric, terms)}, {task}"
    return re.sub(r"<\w+>", place, term.label)


def glossary_markdown() -> str:
    """The content of `docs/metrics.md`."""
    return "\n".join(
        [
            "# Metrics",
            "",
            "Every name that a run logs. Generated: edit `pertoken/tracking/glossary.py`, then run",
            "`python -c 'from pertoken.tracking.glossary import *; write_glossary(\"docs/metrics.md\")'`.",
            "",
            "In formulas `a` runs over the action tokens of a step (those that the policy chose), `e` over its",
            "episodes. Logarithms are natural: 1 nat = 1.44 bits. `<part>` is the name of any reward of the run.",
            "",
            *_table("Training, per step (`metrics.jsonl`)", METRICS),
            *_table("Held-out quality, per evaluation (`evaluations.jsonl`)", HELD_OUT),
            *_table("Streams, per token (`episodes/`, `evaluations/`)", STREAMS),
        ]
    )


def write_glossary(path: str) -> None:
    """Writes `docs/metrics.md`."""
    Path(path).write_text(glossary_markdown(), encoding="utf-8")


def _member(name: str, family: str) -> str | None:
    """What stands in the place of the placeholder of `family`; None if `name` is not of the family."""
    before, _, rest = family.partition("<")
    placeholder, _, after = rest.partition(">")
    inside = name[len(before) : len(name) - len(after)]
    return inside if placeholder and inside and name == before + inside + after else None


def _table(title: str, terms: Mapping[str, Term]) -> list[str]:
    cells = [(f"`{name}`", term.meaning, term.formula.replace("|", "\\|")) for name, term in terms.items()]
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return [f"## {title}", "", "| name | meaning | unit or formula |", "|---|---|---|", *rows, ""]
