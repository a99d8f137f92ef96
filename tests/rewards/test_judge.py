"""A judge behind an end point of our own that answers as it is told; what it quotes is found in the text."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from pertoken.errors import ConfigError, RewardError
from pertoken.jobs import run
from pertoken.rewards import Judge, Weighted, judge, score
from pertoken.tracking.glossary import METRICS, find
from tests.test_trainer import data, settings  # noqa: F401

pytestmark = pytest.mark.skipif(not find_spec("openai"), reason="needs the extra judge")


class Service:
    """An OpenAI-compatible end point: `answer(text of the user) -> (status, words)`."""

    def __init__(self):
        self.asked, self.at_once, self.most_at_once = [], 0, 0
        self.answer = lambda text: (200, json.dumps({"score": 5, "findings": []}))
        self._lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with service._lock:
                    service.at_once += 1
                    service.most_at_once = max(service.most_at_once, service.at_once)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append(body["messages"][-1]["content"])
                status, words = service.answer(body["messages"][-1]["content"])
                with service._lock:
                    service.at_once -= 1
                message = {"role": "assistant", "content": words}
                reply = {
                    "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
                }  # fmt: skip
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(reply if status == 200 else {"error": {"message": words}}).encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def judge(self, **settings):
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return Judge(url, "test", "Be brief.", **{"retries": 0, **settings})


@pytest.fixture
def service(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    service = Service()
    yield service
    service.server.shutdown()


def says(score, *findings):
    rows = [{"quote": quote, "severity": severity, "why": "wrong"} for quote, severity in findings]
    return 200, json.dumps({"score": score, "findings": rows})


def test_the_score_and_the_words_at_fault(service, letters, make_episode, make_scene):
    service.answer = lambda text: says(8, ("bad cat", 5), ("not in it", 10))
    scene = make_scene(make_episode(letters("a bad cat sat")))
    values = service.judge(score=2.0, cost=4.0)(scene)[0, 2:].tolist()
    at = "a bad cat sat".index("bad cat")
    wanted = [0.0] * len(values)
    wanted[at : at + 7] = [-2.0 / 7] * 7
    wanted[-1] += 1.6
    assert values == pytest.approx(wanted)


def test_what_the_judge_reads(service, make_episode, make_scene):
    service.judge(against="reference")(make_scene(make_episode("a cat", "the answer")))
    (asked,) = service.asked
    assert asked == "Rubric:\nBe brief.\n\nIt was written for:\nthe answer\n\nText:\na cat"


def test_quotations_are_found_in_their_order_and_loosely():
    text = 'The cat. It said "no".  The\nCat ran.'
    assert judge._find(text, "The cat", 0) == (0, 7)
    assert judge._find(text, "the cat", 8) == (24, 31)  # further on, in other letters, over a line
    assert judge._find(text, "“The cat.”", 8) == (0, 8)  # only before; the marks are the judge's
    assert judge._find(text, "a dog", 0) is None
    assert judge._find(text, '""', 0) is None


def test_it_is_asked_once_for_the_same_text_in_parallel_and_counts(service, make_episode, make_scene):
    def slowly(text):
        time.sleep(0.2)
        return says(5)

    service.answer = slowly
    scene = make_scene(*(make_episode(f"text {k}", id=str(k)) for k in range(6)))
    reward = service.judge(parallel=3, prices=(10.0, 100.0))
    part = Weighted(reward, 1.0, "judge")
    figures = score([part], scene).figures
    assert 1 < service.most_at_once <= 3
    assert figures["judge_requests/judge"] == 6
    assert figures["judge_spent/judge"] == pytest.approx(6 * (1000 * 10 + 100 * 100) / 1e6)
    assert figures["judge_known_share/judge"] == 0.0
    score([part], scene)
    again = Weighted(service.judge(), 1.0, "judge")  # another run: from the file
    figures = score([again], scene).figures
    assert len(service.asked) == 6
    assert figures["judge_known_share/judge"] == 1.0
    score([Weighted(service.judge(remember=False), 1.0, "judge")], scene)
    assert len(service.asked) == 12


def test_the_same_text_is_asked_about_once_and_counted_as_known_later(service, make_episode, make_scene):
    part = Weighted(service.judge(parallel=4), 1.0, "judge")
    twice = make_scene(*(make_episode("a cat", id=str(k)) for k in range(4)))
    assert score([part], twice).figures["judge_known_share/judge"] == 0.0
    assert len(service.asked) == 1
    half = make_scene(make_episode("a cat", id="0"), make_episode("a dog", id="1"))
    assert score([part], half).figures["judge_known_share/judge"] == 0.5


def test_after_a_failure_no_further_request_is_begun(service, make_episode, make_scene):
    service.answer = lambda text: (404, "no such model")
    scene = make_scene(*(make_episode(f"text {k}", id=str(k)) for k in range(20)))
    with pytest.raises(RewardError, match="gave no answer"):
        service.judge(parallel=1)(scene)
    assert len(service.asked) < 5


def test_an_answer_in_a_fence_is_read_and_numbers_stay_in_the_scale(service, make_episode, make_scene):
    service.answer = lambda text: (200, 'Here:\n```json\n{"score": 70, "findings": null}\n```')
    assert service.judge()(make_scene(make_episode("a cat"))).sum() == 1.0


@pytest.mark.parametrize(
    "words", ["fine", '{"score": "good"}', '{"score": NaN}', '{"findings": []}', "[1]", '{"score": 1']
)
def test_an_answer_in_another_form_is_asked_for_again_then_it_abstains(words, service, make_episode, make_scene):
    service.answer = lambda text: (200, words) if "odd" in text else says(5)
    said = service.judge()(make_scene(make_episode("odd", id="0"), make_episode("even", id="1")))
    assert said.abstained.tolist() == [True, False]
    assert sorted("odd" in asked for asked in service.asked) == [False, True, True]


def test_failures_are_tried_again_and_then_named(service, make_episode, make_scene):
    tries = []

    def flaky(text):
        tries.append(text)
        return (500, "busy") if len(tries) < 3 else says(10)

    service.answer = flaky
    scene = make_scene(make_episode("a cat"))
    assert service.judge(retries=2)(scene).sum() == 1.0
    service.answer = lambda text: (404, "no such model")
    with pytest.raises(RewardError, match=r"reward 'j': http://127.* gave no answer after 0 more tries .*'test' known"):
        score([Weighted(service.judge(remember=False), 1.0, "j")], scene)


def test_a_budget_ends_the_run(service, make_episode, make_scene):
    reward = service.judge(prices=(1e6, 0.0), budget=1500.0, parallel=1)  # 1000 a request
    with pytest.raises(RewardError, match=r"has spent 2000\.0000, its budget is 1500"):
        reward(make_scene(*(make_episode(f"text {k}", id=str(k)) for k in range(4))))
    assert len(service.asked) == 2


@pytest.mark.parametrize(
    ("within", "place"),
    [
        (lambda judge: {"name": "each_turn", "reward": judge}, "each_turn.reward"),
        (
            lambda judge: {"name": "ensemble", "members": [{"name": "length", "max_words": 3, "cost": 0.1}, judge]},
            "ensemble.1",
        ),
    ],
)
def test_a_judge_within_another_reward_counts_on(service, model_folder, data, tmp_path, within, place):  # noqa: F811
    judge = {
        "name": "judge", "url": service.judge().url, "model": "test", "rubric": "Be brief.", "retries": 0,
        "prices": [1e3, 0.0], "parallel": 1, "budget": 20.0, "remember": False,
    }  # fmt: skip
    config = settings(
        model_folder, data, tmp_path, rewards=[within(judge)], stop__steps=5, evaluation__items=0,
        rollout={"prompts_per_step": 2, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 8}},
    )  # fmt: skip
    steps = []
    run.train(config, on_step=lambda report, _: steps.append(report), interrupted=lambda: len(steps) == 1)
    first = len(service.asked)
    assert steps[0].metrics[f"judge_spent/{place}"] == first
    assert find(f"judge_spent/{place}", METRICS).meaning.startswith("What a judge has cost")
    with pytest.raises(RewardError, match="its budget is 20"):
        run.train(config, resume=config.run_folder, on_step=lambda report, _: steps.append(report))
    assert steps[1].metrics[f"judge_spent/{place}"] > first
    assert len(service.asked) == 20


@pytest.mark.parametrize("processes", [0, 1])
def test_a_resumed_run_goes_on_with_what_was_left(service, model_folder, data, tmp_path, processes):  # noqa: F811
    """8 requests a step of 1 each, budget 20: the third step ends the run, resumed or not, and what it cost is kept."""
    entry = {
        "name": "judge", "url": service.judge().url, "model": "test", "rubric": "Be brief.", "retries": 0,
        "prices": [1e3, 0.0], "parallel": 1, "budget": 20.0, "remember": False, "processes": processes,
    }  # fmt: skip
    config = settings(
        model_folder, data, tmp_path, rewards=[entry], stop__steps=5, evaluation__items=0,
        rollout={"prompts_per_step": 2, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 8}},
    )  # fmt: skip
    steps = []
    run.train(config, on_step=lambda report, _: steps.append(report), interrupted=lambda: len(steps) == 1)
    first = len(service.asked)
    assert steps[0].metrics["judge_spent/judge"] == first
    assert first <= 8
    with pytest.raises(RewardError, match="its budget is 20"):
        run.train(config, resume=config.run_folder, on_step=lambda report, _: steps.append(report))
    assert steps[1].metrics["judge_spent/judge"] > first
    assert len(service.asked) == 20
    if not processes:  # a process that fails tells no count
        with pytest.raises(RewardError, match=r"has spent 20\.0000"):
            run.train(config, resume=config.run_folder)
        assert len(service.asked) == 20


def test_neither_order_nor_size_of_the_batch_matters(service, make_episode, make_scene):
    service.answer = lambda text: says(len(text) % 11, ("cat", 3))
    rows = [make_episode(text, id=text) for text in ("a cat", "", "the other cat sat")]
    together = service.judge(remember=False)(make_scene(*rows))
    for k, row in enumerate(rows):
        alone = service.judge(remember=False)(make_scene(row))[0]
        assert alone.tolist() == together[k, : len(alone)].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": 0}, "expected parallel >= 1"),
        ({"prices": (1.0,)}, r"judge\.prices: expected"),
        ({"rubric": " "}, r"judge\.rubric: expected words"),
        ({"cost": -1.0}, "cost >= 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        Judge(**{"url": "http://x/v1", "model": "m", "rubric": "r", **settings})
