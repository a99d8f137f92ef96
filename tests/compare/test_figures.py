"""The statistics of a comparison by numbers that can be checked by hand."""

import json
import math
import random

import numpy as np
import pytest
import sacrebleu

from pertoken.compare.curves import read_curve
from pertoken.compare.figures import Measured, Reading
from pertoken.compare.resamples import Resamples, interval
from pertoken.compare.tables import Report, Table, write_report
from pertoken.errors import ConfigError
from pertoken.text_metrics import COUNTED, bootstrap_mean, corpus_shares, t_mean

ARMS = "compare.arms={base: {}, sft: {}, sequence: {}, token: {}}"


def chrf(*values):
    return {"chrf": list(values)}


@pytest.fixture
def measured(plan_of, made):
    """Two seeds; token earns twice as fast as sequence, and in half the time."""
    plan = plan_of(ARMS, "evaluation.metric=chrf", "compare.seeds=2")
    made(plan.arms["base"].runs[0], [(0, 0, chrf(1, 1, 1, 1))])
    for k in (0, 1):
        made(plan.arms["sft"].runs[k], [(0, 0, chrf(1, 1, 1, 1)), (0, 30, chrf(2, 2, 2, 2 + 4 * k))])
        made(plan.arms["sequence"].runs[k], [(0, 0, chrf(2, 2, 2, 2)), (100, 10, chrf(3, 3, 3, 3)),
                                             (200, 20, chrf(4, 4, 4, 4 + 4 * k))])  # fmt: skip
        made(plan.arms["token"].runs[k], [(0, 0, chrf(2, 2, 2, 2)), (50, 5, chrf(4, 4, 4, 4)),
                                          (150, 15, chrf(6, 6, 6, 10 + 4 * k))])  # fmt: skip
    return of(plan)


def of(plan):
    return Measured(
        plan, {name: [read_curve(run.run_folder, run.seed, plan.split) for run in arm.runs]
               for name, arm in plan.arms.items()},
    )  # fmt: skip


def line(measured, arm, reading):
    return next(each for each in measured.score("chrf", reading).lines if each.arm == arm)


def test_curves_are_read_at_what_all_runs_have_reached(measured):
    tokens, seconds, end = measured.readings()
    assert (tokens.place, seconds.place, end.axis) == (150, 15, None)
    assert tokens.title == "at 150 generated tokens"
    # sequence: half way between 3 (100 tokens) and 4 or 5 (200): 3.5 and 4
    assert line(measured, "sequence", tokens).by_seed == (3.5, 4.0)
    assert line(measured, "token", tokens).by_seed == (7.0, 8.0)
    assert line(measured, "sequence", Reading("", "seconds", 5.0)).by_seed == (2.5, 2.5)
    assert line(measured, "sequence", Reading("", "tokens", 1000.0)).by_seed == (4.0, 5.0)
    assert line(measured, "sft", tokens).by_seed == (2.0, 3.0), "what generates nothing is read at its end"
    assert line(measured, "base", tokens).by_seed == (1.0,)
    assert (line(measured, "sequence", tokens).tokens, line(measured, "sequence", tokens).seconds) == (150, 15)


def test_differences_are_paired_by_seed_and_by_item(measured):
    end = measured.readings()[-1]
    token = line(measured, "token", end)
    assert token.figure.value == 7.5
    assert token.figure.seeds == t_mean([7.0, 8.0])
    # minus sft: 7 - 2 and 8 - 3; over items 4 4 4 8 in both seeds
    assert token.change.value == 5.0
    assert (token.change.seeds.low, token.change.seeds.high) == (5.0, 5.0)
    by_items = bootstrap_mean([4.0, 4.0, 4.0, 8.0])
    assert (token.change.items.low, token.change.items.high) == pytest.approx((by_items.low, by_items.high), abs=1e-9)
    assert token.relative.value == pytest.approx(5.0 / 2.5)
    assert token.judgement == "better"
    assert line(measured, "sft", end).change is None
    base = line(measured, "base", end)
    assert base.change.value == -1.5
    assert base.change.seeds == t_mean([-1.0, -2.0])
    assert base.judgement == "worse on these items", "over two seeds t is too wide"


def test_who_is_how_fast(measured):
    (token,) = measured.reached()
    # sequence ends at 4 and 5, mean 4.5 after 200 tokens; token's mean curve: 4 at 50, 7.5 at 150
    assert token.target == 4.5
    assert token.tokens == pytest.approx((50 + 100 * 0.5 / 3.5) / 200)
    assert token.seconds == pytest.approx((5 + 10 * 0.5 / 3.5) / 20)
    assert token.by_seed == pytest.approx((50 / 200, (50 + 100 * 1 / 4) / 200))


def test_one_seed_has_no_interval_over_seeds_and_says_so(plan_of, made):
    plan = plan_of("compare.arms={sft: {}, token: {}}", "evaluation.metric=chrf", "compare.seeds=1")
    made(plan.arms["sft"].runs[0], [(0, 0, chrf(1, 2, 3, 4))])
    made(plan.arms["token"].runs[0], [(0, 0, chrf(1, 2, 3, 4)), (9, 9, chrf(2, 3, 4, 6))])
    measured = of(plan)
    token = line(measured, "token", measured.readings()[-1])
    assert token.figure.seeds is None
    assert token.change.seeds is None
    assert token.judgement == "better on these items"
    report = Report.of(measured)
    assert any("there is one seed" in word for word in report.words)
    assert report.tables[0].rows[1][3] == "–"  # token, 95%, seeds
    assert measured.reached() == []


def test_items_belong_together_by_their_ids(plan_of, made):
    scores = []
    for name, ids in (("one", ("a", "b", "c", "d")), ("two", ("d", "b", "a", "c"))):
        plan = plan_of(f"compare.arms={{sft: {{}}, {name}: {{}}}}", "evaluation.metric=chrf", "compare.seeds=1")
        if name == "one":
            made(plan.arms["sft"].runs[0], [(0, 0, chrf(1, 2, 3, 4))])
        made(plan.arms[name].runs[0], [(0, 0, chrf(0, 0, 0, 0)), (5, 5, chrf(2, 2, 7, 9))], ids=ids)
        measured = of(plan)
        scores.append(line(measured, name, measured.readings()[-1]).change)
    assert scores[0] == scores[1]


def test_items_that_one_run_does_not_have_are_left_out_of_all(plan_of, made):
    plan = plan_of("compare.arms={sft: {}, token: {}}", "evaluation.metric=chrf", "compare.seeds=1")
    made(plan.arms["sft"].runs[0], [(0, 0, chrf(1, 2, 3, 100))], ids=("a", "b", "c"))
    made(plan.arms["token"].runs[0], [(0, 0, chrf(1, 2, 3, 4)), (9, 9, chrf(2, 3, 4, 6))])
    score = of(plan).scores()[-1]
    assert (score.num_items, score.most_items) == (3, 4)
    assert any(word.startswith("Only 3 of 4 held-out items are in all runs") for word in Report.of(of(plan)).words)
    assert [each.figure.value for each in score.lines] == [2.0, 3.0]


def test_a_metric_without_items_has_a_value_and_no_interval(plan_of, made):
    plan = plan_of("compare.arms={sft: {}, token: {}}", "compare.metrics=[distinct_2]", "compare.seeds=1")
    for arm, value in (("sft", 0.5), ("token", 0.75)):
        made(plan.arms[arm].runs[0], [(0, 0, chrf(1, 2, 3, 4))], metrics={"distinct_2": value})
    (_, token) = of(plan).scores()[-1].lines
    assert (token.change.value, token.change.items, token.judgement) == (0.25, None, "not proven")
    plan = plan_of("compare.arms={sft: {}, token: {}}", "compare.metrics=[bleu]", "compare.seeds=1")
    with pytest.raises(ConfigError, match="has no bleu at step 0"):
        of(plan).scores()


TEXTS = ["the cat sat on the mat", "a dog ran", "it rains in the town today", "nothing at all to say here"]
KNOWN = ["the cat sat on a mat", "the dog ran away", "it rains in town today", "there is nothing to say here"]


@pytest.mark.parametrize("metric", ["corpus_bleu", "corpus_chrf"])
def test_a_corpus_metric_on_resamples_is_sacrebleu_on_the_texts_that_were_drawn(metric):
    resamples = Resamples(("a", "b", "c", "d"))
    values = resamples.corpus(metric, TEXTS, KNOWN)
    official = getattr(sacrebleu, metric)
    assert values[0] == pytest.approx(official(TEXTS, [KNOWN]).score, abs=1e-9)
    for draw in (1, 2, 77):
        chosen = [k for k, count in enumerate(resamples.counts[draw]) for _ in range(int(count))]
        assert len(chosen) == 4
        texts, known = [TEXTS[k] for k in chosen], [KNOWN[k] for k in chosen]
        assert values[draw] == pytest.approx(official(texts, [known]).score, abs=1e-9)


@pytest.mark.parametrize("metric", COUNTED)
def test_intervals_by_shares_are_those_of_texts_that_are_drawn_again(metric):
    draw = random.Random(0)
    known = [" ".join(draw.choices("abcdefgh", k=12)) for _ in range(150)]
    before, after = (
        [" ".join(w if draw.random() > wrong else "x" for w in text.split()) for text in known] for wrong in (0.4, 0.3)
    )
    answers = [[text] for text in known]
    shares = [corpus_shares(texts, answers, further={metric})[metric] for texts in (before, after)]
    by_shares = bootstrap_mean([new - old for old, new in zip(*shares, strict=True)])
    resamples = Resamples(tuple(map(str, range(150))))
    drawn = interval(resamples.corpus(metric, after, known) - resamples.corpus(metric, before, known))
    assert by_shares.mean == pytest.approx(drawn.mean, abs=1e-9)
    width = drawn.high - drawn.low
    assert (by_shares.low, by_shares.high) == pytest.approx((drawn.low, drawn.high), abs=0.06 * width)


def test_bleu_on_resamples_cuts_chinese_into_characters():
    texts, known = ["我喜欢猫和小狗", "今天下雨了不出门"], ["我喜欢猫和狗", "今天下雨不出门"]
    values = Resamples(("a", "b")).corpus("corpus_bleu", texts, known, language="zh")
    assert values[0] == pytest.approx(sacrebleu.corpus_bleu(texts, [known], tokenize="zh").score, abs=1e-9)
    assert values[0] > Resamples(("a", "b")).corpus("corpus_bleu", texts, known)[0] + 1


def test_a_corpus_metric_of_runs_has_an_interval_if_it_is_sacrebleus(plan_of, made):
    plan = plan_of("compare.arms={sft: {}, token: {}}", "compare.metrics=[corpus_chrf]", "compare.seeds=1")
    known = [f"answer {item}" for item in "abcd"]
    for arm, said in (("sft", "answer x"), ("token", "answer a")):
        recorded = sacrebleu.corpus_chrf([said] * 4, [known]).score
        made(plan.arms[arm].runs[0], [(0, 0, chrf(1, 2, 3, 4))], metrics={"corpus_chrf": recorded},
             outputs=dict.fromkeys("abcd", said))  # fmt: skip
    sft, token = of(plan).scores()[-1].lines
    assert sft.figure.items is not None
    assert token.change.value == pytest.approx(token.figure.value - sft.figure.value)
    assert token.figure.items.low < token.figure.value < token.figure.items.high


def test_a_metric_of_all_texts_together_is_of_the_same_items_or_refused(plan_of, made):
    """sft answers three of the four items: what it has recorded is of other texts than what token has."""
    plan = plan_of("compare.arms={sft: {}, token: {}}", "compare.metrics=[corpus_chrf]", "compare.seeds=1")
    said, known = ["answer x", "answer b", "answer c", "answer"], [f"answer {item}" for item in "abcd"]
    for arm, count in (("sft", 3), ("token", 4)):
        recorded = sacrebleu.corpus_chrf(said[:count], [known[:count]]).score
        made(
            plan.arms[arm].runs[0],
            [(0, 0, chrf(1, 2, 3, 4))],
            ids=tuple("abcd"[:count]),
            metrics={"corpus_chrf": recorded, "distinct_1": 0.5},
            outputs=dict(zip("abcd", said, strict=True)),
        )
    measured = of(plan)
    sft, token = measured.scores()[-1].lines
    assert sft.figure.value == token.figure.value == pytest.approx(sacrebleu.corpus_chrf(said[:3], [known[:3]]).score)
    assert measured.points(measured.curves["token"][0], "corpus_chrf") == [token.figure.value]
    assert token.change.items is not None
    plan = plan_of("compare.arms={sft: {}, token: {}}", "compare.metrics=[distinct_1]", "compare.seeds=1")
    with pytest.raises(ConfigError, match="has items that other runs do not have"):
        of(plan).scores()


def test_perplexity_on_resamples_counts_tokens_not_texts(plan_of, made):
    """One text of one token at 1 nat, three of three tokens at 2 nats: exp of 19 nats over 10 tokens."""
    plan = plan_of("compare.arms={sft: {}, token: {}}", "compare.metrics=[perplexity]", "compare.seeds=1")
    nats, tokens = [1.0, 2.0, 2.0, 2.0], dict(zip("abcd", (1, 3, 3, 3), strict=True))
    for arm, less in (("sft", 0.0), ("token", 0.5)):
        values = {"nats_per_token": [each - less for each in nats]}
        recorded = {"perplexity": math.exp(1.9 - less)}
        made(plan.arms[arm].runs[0], [(0, 0, values)], metrics=recorded, lengths=tokens)
    sft, token = of(plan).scores()[-1].lines
    assert sft.figure.value == pytest.approx(math.exp(1.9))
    assert token.change.value == pytest.approx(math.exp(1.4) - math.exp(1.9))
    assert sft.figure.items.low < math.exp(1.9) < sft.figure.items.high <= math.exp(2.0)
    assert token.judgement == "better on these items", "less of it is better"


def test_the_mean_over_items_is_the_bootstrap_of_text_metrics():
    values = [0.1, 0.7, 0.4, 0.9]
    found = Resamples(("a", "b", "c", "d")).mean(values)
    known = bootstrap_mean(values)
    assert found[0] == pytest.approx(known.mean)
    assert np.quantile(found[1:], [0.025, 0.975]) == pytest.approx((known.low, known.high))


def test_tables_in_every_format(measured):
    pytest.importorskip("matplotlib")
    report = Report.of(measured, ["arm trl is left out"])
    files = {path.name: path for path in write_report(report, measured, [])}
    assert set(files) >= {"comparison.md", "comparison.html", "comparison.tex", "comparison.json", "chrf-tokens.svg"}
    text = files["comparison.md"].read_text()
    assert "## chrF at 150 generated tokens" in text
    assert "| token | 7.5 |" in text
    assert "token reaches the final chrF of sequence (4.5) after 32% of its tokens and 32% of its seconds" in text
    assert "arm trl is left out" in text
    page = files["comparison.html"].read_text()
    assert page.count("<table>") == 3
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "<script" not in page
    assert r"\toprule" in files["comparison.tex"].read_text()
    rows = files["chrf-tokens.csv"].read_text().splitlines()
    assert rows[0] == "arm,seed,tokens,chrf"
    assert "token,1,150,8" in rows
    assert json.loads(files["comparison.json"].read_text())["reached"][0]["arm"] == "token"


def test_cells_are_plain_text_in_every_format():
    table = Table("a & b", ("arm", "x_1"), (("<b>|", "5%"),))
    assert r"| <b>\| | 5% |" in table.markdown()
    assert "&lt;b&gt;|" in table.html()
    assert "<b>" not in table.html()
    assert r"\caption{a \& b}" in table.latex()
    assert r"x\_1" in table.latex()
    assert r"5\%" in table.latex()
