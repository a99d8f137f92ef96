"""Puts the mistake of every trap into a copy of the code, and watches the test of the trap fail.

    python benchmarks/traps_put_in.py                  # some minutes on one core
    python benchmarks/traps_put_in.py --only R2 16     # these traps

Each row of docs/correctness.md has its mistake here: what a file says, what it says with the mistake in it, and the
tests that must see it. The copy is build/traps; each mistake is put in, the tests are run in a process of their own,
and the file is put back. At first the tests are run without any mistake, and have to pass. Prints a Markdown table,
and exits with 1 if a test does not fail, or if the page names a trap that is not here.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from mutants import copy_checkout

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "traps"


@dataclass(frozen=True)
class Mistake:
    """A trap put in: in `file`, `was` becomes `now`."""

    trap: str
    file: str
    was: str
    now: str
    tests: tuple[str, ...]


CREDIT, OBJECTIVES = "pertoken/credit.py", "pertoken/objectives.py"
BASE, PARTS = "pertoken/rewards/base.py", "pertoken/rewards/parts.py"
SCORING, SAMPLING = "pertoken/policy/scoring.py", "pertoken/sampling.py"
OF_CREDIT, OF_OBJECTIVES, OF_BASE = "tests/test_credit.py", "tests/test_objectives.py", "tests/rewards/test_base.py"
RATIO = "tests/rollout/test_ratio.py::test_ratio_is_one_before_the_first_update"

MISTAKES = (
    Mistake(
        "R1", CREDIT, "    if bool(lost.any()):", "    if False:",
        (f"{OF_CREDIT}::test_trap_r1_reward_on_masked_cell_raises",),
    ),
    Mistake(
        "R1", PARTS, "scatter_add(1, target, values) * action_mask", "add(values) * action_mask",
        (f"{OF_BASE}::test_trap_r1_reward_on_masked_tail",),
    ),
    Mistake(
        "R2", CREDIT, "1).gather(1, _next_action(action_mask))", "1)[:, 1:]",
        (f"{OF_CREDIT}::test_trap_r2_constant_value_is_no_advantage_across_any_holes",),
    ),
    Mistake(
        "R3", CREDIT, "running = torch.where(action_mask[:, t], x[:, t] + decay * running, running)",
        "running = x[:, t] + decay * running",
        (f"{OF_CREDIT}::test_trap_r3_pad_values_do_not_leak_into_gae",),
    ),
    Mistake(
        "R4", CREDIT, "x[:, t] + decay * running, running)", "x[:, t] + decay * running, 0.0)",
        (f"{OF_CREDIT}::test_trap_r4_reward_to_go_passes_a_hole",),
    ),
    Mistake(
        "R5", CREDIT, "deltas = rewards + gamma", "deltas = rewards.roll(1, 1) + gamma",
        (f"{OF_CREDIT}::test_trap_r5_advantage_of_eos_is_reward_minus_value",),
    ),
    Mistake(
        "R6", BASE, "torch.tensor(of_sample, dtype=torch.float64)", "torch.tensor(of_sample).double() / (row + 1)",
        (f"{OF_BASE}::test_trap_r6_order_and_size_of_the_batch_do_not_matter",),
    ),
    Mistake(
        "R7", PARTS, "if values.shape != scene.batch.tokens.shape or", "if",
        (f"{OF_BASE}::test_trap_r7_a_short_list_never_reaches_the_wrong_rows",),
    ),
    Mistake(
        "8", "pertoken/batching.py", "action_mask=padded([e.action_mask for e in episodes], False, torch.bool),",
        "action_mask=padded([[a and t != pad_id for a, t in zip(e.action_mask, e.tokens)] for e in episodes], False, "
        "torch.bool),",
        ("tests/test_batching.py::test_trap_8_a_token_that_looks_like_padding_stays_an_action",),
    ),
    Mistake(
        "9", "pertoken/rollout/collect.py", "tokens=prompt + completion.tokens,",
        "tokens=prompt + completion.tokens[:-1] + [256],",
        ("tests/rollout/test_collect.py::test_trap_9_a_truncated_tail_is_not_overwritten_with_an_end",),
    ),
    Mistake(
        "10", CREDIT, "return torch.where(terminated, 0.0, values_after_last)",
        "return torch.zeros_like(values_after_last)",
        (f"{OF_CREDIT}::test_trap_10_truncated_and_terminated_differ_by_the_bootstrap_whatever_the_width",),
    ),
    Mistake(
        "11", SCORING, "row * width + column - 1, last", "row * width + column, last",
        ("tests/policy/test_scoring.py::test_trap_11_logprobs_and_entropy_equal_the_plain_forward",),
    ),
    Mistake(
        "12", SCORING, "positions = torch.arange(width, device=device).expand_as(batch.tokens)",
        "positions = torch.arange(width, device=device) + (width - lengths)[:, None]",  # as if padded on the left
        (f"{RATIO}[plain-trap_12_absolute_positions-padded]",),
    ),
    Mistake(
        "13", "pertoken/policy/model.py", "self.model.train(self.dropout)", "self.model.train(True)",
        ("tests/policy/test_scoring.py::test_trap_13_dropout_is_off_unless_asked_for",),
    ),
    Mistake(
        "14", SCORING, "(controls.sampling.temperature or 1.0) / scale", "1.0 / scale",
        (f"{RATIO}[trap_14_temperature-llama-padded]",),
    ),
    Mistake(
        "15", SCORING, "return (z if keep is None else z.masked_fill(~keep, -torch.inf)).log_softmax(1)",
        "return z.log_softmax(1)",
        tuple(f"{RATIO}[trap_15_{name}-llama-padded]" for name in ("top_k", "top_p", "min_p")),
    ),
    *(
        Mistake(
            "16", SCORING, "z = processed_logits(logits, controls, generated, history)",
            "from dataclasses import replace\n"
            f"        sampling = controls.sampling.model_copy(update={{'{name}': {off}}})\n"
            "        z = processed_logits(logits, replace(controls, sampling=sampling), generated, history)",
            (f"{RATIO}[trap_16_{name}-llama-padded]",),
        )
        for name, off in (("repetition_penalty", 1.0), ("no_repeat_ngram", 0), ("min_new_tokens", 0))
    ),
    Mistake(
        "17", "pertoken/rollout/engine.py", "decoders = self._decoders(controls)",
        "decoders = self._decoders(controls)\n"
        "        from dataclasses import replace\n"
        "        inherited = {'top_k': self._hf.generation_config.top_k or 0}\n"
        "        controls = replace(controls, sampling=controls.sampling.model_copy(update=inherited))",
        ("tests/rollout/test_engine.py::test_trap_17_generation_config_never_leaks_in",),
    ),
    Mistake(
        "18", BASE, "        tokens = episode.tokens[start:]",
        "        tokens = self.tokenizer.encode(self.tokenizer.decode(episode.tokens[start:]))",
        (f"{OF_BASE}::test_trap_18_sampled_ids_are_never_tokenised_again",),
    ),
    Mistake(
        "19", OBJECTIVES, "count(action_mask, over=over) if denominator is None else denominator",
        "count(action_mask, over=over)",
        (f"{OF_OBJECTIVES}::test_trap_19_any_split_gives_the_gradient_of_one_batch",),
    ),
    Mistake(
        "19", "pertoken/batching.py", "            num_actions=num_actions,",
        "            num_actions=int(batch.action_mask[piece].sum()),",
        ("tests/test_trainer.py::test_trap_19_micro_batches_give_the_same_update",),
    ),
    Mistake(
        "20", OBJECTIVES, '    if over == "sequence":\n        row_sums = row_sums /',
        '    if over != "constant":\n        row_sums = row_sums /',
        (f"{OF_OBJECTIVES}::test_trap_20_length_bias_of_each_aggregation",),
    ),
    Mistake(
        "21", CREDIT, "centered, variance = _moments(advantages, action_mask, torch.zeros_like(group)",
        "centered, variance = _moments(advantages, torch.ones_like(action_mask), torch.zeros_like(group)",
        (f"{OF_CREDIT}::test_trap_21_whitening_ignores_padding_and_keeps_its_sense",),
    ),
    Mistake(
        "21", CREDIT, "return torch.where(variance > 0, x / scale, 0.0)", "return x / scale",
        (f"{OF_CREDIT}::test_trap_21_whitening_none_or_one_action_gives_zero",),
    ),
    Mistake(
        "22", PARTS, "        raw = _credited(part.name, said, scene)\n",
        "        raw = sum((_credited(other.name, _of_its_tasks(other, scene)[0], scene) for other in rewards))\n",
        ("tests/rewards/test_composition.py::test_trap_22_a_part_is_normalised_before_the_others_are_added",),
    ),
    Mistake(
        "23", CREDIT, "    return torch.where(action_mask, rewards, 0.0)",
        "    return torch.where(action_mask, rewards, 0.0).clamp(-10, 10)",
        (f"{OF_CREDIT}::test_trap_23_no_estimator_clips_rewards_on_its_own",),
    ),
    Mistake(
        "24", OBJECTIVES, "loss = loss + kl_coefficient * penalty", "loss = loss + 2 * kl_coefficient * penalty",
        (f"{OF_OBJECTIVES}::test_trap_24_kl_counts_exactly_once",),
    ),
    Mistake(
        "24", OBJECTIVES, "loss = loss + kl_coefficient * penalty", "pass",
        (f"{OF_OBJECTIVES}::test_trap_24_kl_counts_exactly_once",),
    ),
    Mistake(
        "25", OBJECTIVES, "return ratio(new_logprobs, old_logprobs, action_mask) * estimates", "return estimates",
        (
            f"{OF_OBJECTIVES}::test_trap_25_which_kl_each_loss_descends",
            f"{OF_OBJECTIVES}::test_trap_25_only_the_ratio_form_survives_old_samples",
        ),
    ),
    Mistake(
        "26", OBJECTIVES, "error * num_episodes / self.horizon", "0.1 * error",
        (f"{OF_OBJECTIVES}::test_trap_26_one_step_is_bounded_per_episode",),
    ),
    Mistake(
        "26", OBJECTIVES, "sequence_kl / self.target - 1.0", "sequence_kl / 10 / self.target - 1.0",
        (f"{OF_OBJECTIVES}::test_trap_26_controller_reaches_its_target_in_sequence_nats",),
    ),
    Mistake(
        "27", OBJECTIVES, 'self.coefficient = state["coefficient"]', "pass",
        (f"{OF_OBJECTIVES}::test_trap_27_controller_state_survives_a_restart_bit_for_bit",),
    ),
    Mistake(
        "28", OBJECTIVES, 'aux = {"ratio": torch.where(mask, w, 0.0).detach()', 'aux = {"ratio": w.detach()',
        (f"{OF_OBJECTIVES}::test_trap_28_figures_are_zero_outside_the_loss_mask",),
    ),
    Mistake(
        "29", BASE, "    if not isinstance(value, Real):", "    if value is None:\n        return 0.0\n    if False:",
        (f"{OF_BASE}::test_trap_29_no_opinion_is_said_and_not_guessed",),
    ),
    Mistake(
        "29", BASE, "            abstained[row] = True", "            pass",
        (
            "tests/rewards/test_composition.py::test_trap_29_who_abstains_takes_no_part_in_the_statistics",
            "tests/rewards/test_composition.py::test_trap_29_who_abstains_is_no_baseline_of_the_part",
        ),
    ),
    Mistake(
        "30", "pertoken/rewards/isolation.py", "time_limit=time_limit,\n                memory_limit",
        "time_limit=None,\n                memory_limit",
        ("tests/rewards/test_isolation.py::test_trap_30_each_fault_is_that_of_its_completion",),
    ),
    Mistake(
        "31", BASE, "in spread(sample.aligned, span.start, span.stop, _number(span.value)) if values else ():",
        "in [(min(span.start, len(values) - 1), span.value)]:",
        (f"{OF_BASE}::test_trap_31_a_foreign_tokenizer_is_mapped_by_characters",),
    ),
    Mistake(
        "32", CREDIT, "    start = x.new_zeros(len(ids), x.shape[1])",
        "    slot = torch.arange(len(group)) * len(ids) // max(len(group), 1)  # as if they lay side by side\n"
        "    start = x.new_zeros(len(ids), x.shape[1])",
        (f"{OF_CREDIT}::test_trap_32_interleaved_groups_stay_apart",),
    ),
    Mistake(
        "33", CREDIT, "shifted = torch.where(counted, x - lowest, 0.0)", "shifted = torch.where(counted, x, 0.0)",
        (f"{OF_CREDIT}::test_trap_33_equal_rewards_give_exactly_zero",),
    ),
    Mistake(
        "34", CREDIT, "    # scatter_add: masked cells share",
        "    returns = torch.where(action_mask, _earned(rewards, action_mask).sum(1, keepdim=True), 0.0)\n"
        "    # scatter_add: masked cells share",
        (f"{OF_CREDIT}::test_trap_34_process_estimators_tell_where_a_reward_fell",),
    ),
    Mistake(
        "34", OBJECTIVES, 'row_mean if level == "sequence" else row_mean.detach() + own_gradient', "row_mean",
        (f"{OF_OBJECTIVES}::test_trap_34_sequence_token_keeps_the_place_of_credit_and_sequence_does_not",),
    ),
    Mistake(
        "35", CREDIT, "scored = action_mask & (rewards != 0 if scored is None else scored)", "scored = action_mask",
        (f"{OF_CREDIT}::test_trap_35_unscored_tokens_do_not_enter_group_statistics",),
    ),
    Mistake(
        "36", "pertoken/assembly/run.py", "Controls.resolve(evaluation.sampling, ",
        "Controls.resolve(config.rollout.sampling, ",
        ("tests/test_evaluation.py::test_trap_36_how_training_samples_and_measures_is_not_how_held_out_texts_are",),
    ),
    Mistake(
        "36", "pertoken/evaluation.py", "fixed = [part.fixed() for part in rewards]", "fixed = list(rewards)",
        ("tests/test_evaluation.py::test_trap_36_how_training_samples_and_measures_is_not_how_held_out_texts_are",),
    ),
)  # fmt: skip


def outcome(tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code for `tests` of the copy, in a process that is forked from this one, and what it said last."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.chdir(PLACE)
        sys.path[:0] = [str(PLACE)]
        import pytest

        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--timeout=120", *tests])
        os.write(write, said.getvalue()[-3000:].encode())
        os._exit(int(code))
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        words = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words


def main() -> None:
    """Make the copy, try each mistake, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of traps")
    only = parser.parse_args().only
    # What every child needs and no mistake touches, loaded once; the package itself comes from the copy.
    import pytest  # noqa: F401
    import transformers  # noqa: F401

    copy_checkout(PLACE)
    chosen = [mistake for mistake in MISTAKES if not only or mistake.trap in only]
    code, words = outcome(sorted({test for mistake in chosen for test in mistake.tests}))
    if code:
        raise SystemExit(f"the tests fail without any mistake:\n{words}")
    unseen = 0
    print("| trap | in | was | put in | failed |\n|---|---|---|---|---|")
    for mistake in chosen:
        path = PLACE / mistake.file
        text = path.read_text(encoding="utf-8")
        if text.count(mistake.was) != 1:
            raise SystemExit(f"{mistake.file} has {text.count(mistake.was)} times, expected once: {mistake.was}")
        for test in mistake.tests:
            path.write_text(text.replace(mistake.was, mistake.now), encoding="utf-8")
            code, words = outcome([test])
            path.write_text(text, encoding="utf-8")
            unseen += code != 1
            was, now = (" ".join(part.split()).replace("|", "\\|") for part in (mistake.was, mistake.now))
            said = {0: "**no**", 1: "yes"}.get(code, f"**pytest ended with {code}**")
            where = f"| {mistake.trap} | `{mistake.file}` | `{was}` | `{now}` |"
            print(f"{where} {said}: `{test.partition('::')[2]}` |", flush=True)
    page = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    traps = set(re.findall(r"^\| (R?\d+) \| [^|]* \| [^|]* \| `", page, flags=re.MULTILINE))
    missing = traps - {mistake.trap for mistake in MISTAKES} if not only else set()
    if missing:
        print(f"\nWithout a mistake here: {sorted(missing)}")
    sys.exit(int(unseen > 0 or bool(missing)))


if __name__ == "__main__":
    main()
