"""Changes each operator, number, name and default of the token maths, one at a time: which change does no test see?

    pip install "mutmut>=3.8"
    python benchmarks/mutants.py                       # some 15 minutes on one core; or: make mutants
    python benchmarks/mutants.py --files pertoken/segments.py
    python benchmarks/mutants.py --only 'pertoken.credit.x_gae*' 'pertoken.objectives.x_ratio*'

mutmut runs in a copy of this checkout, build/mutants, with the tests of the maths alone; each mutant meets the tests
that call its function, fastest first, until one fails. Prints the share that was killed, and each survivor with the
reason why no test can tell it, or without one. Exits with 1 below 95% or if a survivor has no reason.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "mutants"
MATHS = ("tests/test_credit.py", "tests/test_objectives.py", "tests/test_fixtures.py", "tests/test_exact_gradient.py")
SEGMENTS = (
    "test_segments_by_hand",
    "test_all_that_is_known_of_a_token_goes_with_it",
    "test_what_is_taken_and_put_back_is_the_same_and_each_action_once",
    "test_the_value_behind_a_text_is_that_behind_its_last_segment",
    "test_credit_of_the_texts_at_the_segments",
    "test_a_text_without_actions_is_one_segment_however_short_those_are",
    "test_without_a_critic_later_segments_pay_earlier_ones_and_nothing_is_lost",
    "test_baselines_are_of_texts_however_many_segments_they_have",
    "test_the_segments_of_a_text_are_learnt_in_one_optimiser_step",
)
FILES = {
    "pertoken/credit.py": MATHS,
    "pertoken/objectives.py": MATHS,
    "pertoken/segments.py": tuple(f"tests/test_segments.py::{name}" for name in SEGMENTS),  # those without a model
}
"""What is changed -> the tests that have to see it."""
ENOUGH = 0.95

SAME: dict[str, str] = {
    "torch.where(advantages <= 0, torch.minimum(loss, -advantages * dual_clip), loss)": "an advantage of 0 has loss 0",
    "importance_weights: level: Mismatch =": "any name but the other two means by token; no other passes the types",
    "row_sums.sum() / (divisor or 2)": "a count is 0 where nothing acts, and the sum is 0 there",
    "width = int(macro.max()) + 2 if macro.numel() else 1": "a macro action more, without members",
    "width = int(macro.max()) + 1 if macro.numel() else 2": "a macro action more, without members",
    "speaking = torch.ones_like(group, dtype=None)": "any number but 0 says that the row speaks",
    "speaking = torch.ones_like(group, )": "any number but 0 says that the row speaks",
    "_moments(advantages, action_mask, group, unbiased=False)[0]": "the mean has no n - 1",
    "device=None)": "tests have one device",
    ".to(None)": "tests have one device",
    "torch.arange(width, )": "tests have one device",
    "torch.arange(column.shape[1], )": "tests have one device",
    "torch.tensor(numbers, )": "tests have one device",
    "torch.tensor([len(own) for own in columns], )": "tests have one device",
    "strict=None)": "one loop makes both, so they are equally long",
    "strict=False)": "one loop makes both, so they are equally long",
    "zip(*_places(batch, sampling.segment), )": "each place has four parts",
    "zip(text, begins, )": "one loop makes both, so they are equally long",
    "zip(lengths, prompts, )": "both have a number for each row",
    "monte_carlo: known = totals.expand(-1, width + 3)": "a column more, that nothing reads",
    "scatter(1, place, torch.where(starts, values, 1.0))": "where no step starts, it goes to a column nothing reads",
    "_moments: mean = _over_group(shifted.sum(1, keepdim=True), group": "a number less itself is 0 whatever the count",
    "kl_loss: raise ValueError(None)": "the type checker of the tests refuses k1 before it is reached",
}
"""Part of `function: changed line` -> why no test can tell."""


def copy_checkout(place: Path) -> None:
    """The checkout as it stands, committed or not, without what was built from it, in `place`."""
    shutil.rmtree(place, ignore_errors=True)
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)


def configure(files: Sequence[str]) -> None:
    """Tell the copy what to change, and which tests to ask."""
    settings = {
        "source_paths": ["pertoken"],
        "only_mutate": list(files),
        "also_copy": ["tests", "docs", "pyproject.toml"],
        "pytest_add_cli_args_test_selection": list(dict.fromkeys(test for file in files for test in FILES[file])),
        "pytest_add_cli_args": ["-p", "no:cacheprovider"],
    }
    with (PLACE / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))


def mutmut(*arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=PLACE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {PLACE}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def change(mutant: str) -> tuple[str, str]:
    """The line before and after."""
    lines = mutmut("show", mutant).splitlines()
    was, now = ([line[1:].strip() for line in lines if re.match(rf"\{sign}(?!\{sign})", line)] for sign in "-+")
    return " ".join(was), " ".join(now)


def main() -> None:
    """Make the copy, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of mutants, with wildcards")
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES), help="files that are changed")
    options = parser.parse_args()
    copy_checkout(PLACE)
    configure(options.files)
    mutmut("run", "--max-children", "1", *options.only)
    outcomes = re.findall(r"^\s*(\S+): ([\w ]+)$", mutmut("results", "--all", "true"), flags=re.MULTILINE)
    asked = [(name, outcome) for name, outcome in outcomes if outcome != "not checked"]
    alive = [name for name, outcome in asked if outcome not in ("killed", "timeout", "segfault")]
    share = 1 - len(alive) / len(asked)
    print(f"{len(asked)} mutants, {len(asked) - len(alive)} killed ({share:.1%}), {len(alive)} survived\n")
    print("| function | was | became | why no test can tell |\n|---|---|---|---|")
    unexplained = 0
    for name in alive:
        was, now = change(name)
        function = re.sub(r".*\.x[_ǁ](.*)__mutmut_\d+", r"\1", name).replace("ǁ", ".")
        reason = next((why for part, why in SAME.items() if part in f"{function}: {now}"), "")
        unexplained += not reason
        cells = (text.replace("|", "\\|") for text in (was, now))
        print(f"| `{function}` | {' | '.join(f'`{cell}`' for cell in cells)} | {reason or '**unexplained**'} |")
    sys.exit(int(share < ENOUGH or unexplained > 0))


if __name__ == "__main__":
    main()
