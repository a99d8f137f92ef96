"""Answers for use: greedy is what the engine gives, the best is the best paid, beams are the likeliest."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from pertoken.assembly import build_engine
from pertoken.config import load_config
from pertoken.errors import ConfigError
from pertoken.jobs.generation import Generator, generate_all, read_prompts
from pertoken.jobs.run import Speaker
from pertoken.policy.model import Policy
from pertoken.rewards.align import align
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, family_model

REWARDS = "rewards=[{name: length, max_words: 1, cost: 0.5}, {name: chrf, granularity: token}]"


@pytest.fixture
def speaker(model_folder):
    def make(*settings, **options):
        config = load_config([], [
            f"policy.model={model_folder}", "policy.precision=float32", "policy.compile=false",
            "rollout.sampling.max_new_tokens=12", REWARDS, *settings,
        ])  # fmt: skip
        return Speaker(config, **options)

    return make


def test_greedy_and_the_first_sample_are_what_streaming_says(speaker):
    for settings, greedy in (([], True), ([], False), (["rollout.sampling.top_p=0.8"], False)):
        one = speaker(*settings, greedy=greedy)
        streamed = one.stream("hello", seed=3, on_piece=lambda *_: None)
        (answers,) = Generator(one, "sample", 3)([one.item("hello")], ["hello"], seed=3)
        assert answers.said[0].text == streamed
        different = {said.text for said in answers.said}
        assert len(different) == (1 if greedy else 3)
        assert answers.said[0].reward is None
        if greedy:
            prompt = one.policy.tokenizer.encode("hello")
            ids = one.engine.generate([prompt], one.controls, seeds=[8])[0].tokens
            assert align(ids, one.policy.tokenizer).text == streamed
            with torch.no_grad():
                logits = one.policy.hf_model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(1).tolist() == ids


def test_the_best_of_many_is_the_best_paid_of_the_samples(speaker):
    one = speaker()
    item = one.item("hello", "hello there")
    (samples,) = Generator(one, "sample", 6)([item], ["hello"], seed=1)
    (best,) = Generator(one, "best", 6)([item], ["hello"], seed=1)
    assert sorted(said.text for said in best.said) == sorted(said.text for said in samples.said)
    rewards = [said.reward for said in best.said]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards[0] > rewards[-1]
    for said in best.said:
        assert len(said.rewards) == len(said.pieces)
        assert sum(said.rewards) == pytest.approx(said.reward, abs=1e-5)
    with pytest.raises(ConfigError, match="they are all the same"):
        Generator(speaker(greedy=True), "best", 6)


def test_as_many_beams_as_there_are_tokens_find_the_likeliest_text():
    """Two tokens of 64: with 64 beams nothing is cut off, so the first is the best of all pairs that do not end."""
    model = family_model("llama")
    one = object.__new__(Speaker)
    config = load_config([], ["rollout.sampling.max_new_tokens=2", "rollout.sampling.min_new_tokens=2"])
    tokenizer = byte_tokenizer()
    one.config, one.chat = config, False
    one.policy = Policy(model, tokenizer, precision="float32", compile=False)
    one.engine = build_engine(one.policy, config.rollout)
    one.controls = Controls.resolve(config.rollout.sampling, tokenizer, (63,))
    generator = Generator(one, "beams", 64)
    prompt = [5, 9, 2]
    item = one.item(tokenizer.decode(prompt))
    assert tokenizer.encode(item.prompt) == prompt
    found = generator._beams(item)
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(0)
        second = model(torch.tensor([[*prompt, k] for k in range(64)])).logits[:, -1].log_softmax(1)
        first[63] = second[:, 63] = -torch.inf  # min_new_tokens
        joint = first[:, None] + second
    best = sorted(itertools.product(range(64), range(64)), key=lambda pair: -joint[pair].item())
    assert tuple(found[0].tokens) == best[0]
    assert {tuple(beam.tokens) for beam in found[:5]} == set(best[:5])
    banned = best[0][0]
    one.controls = replace(one.controls, banned_ids=((banned,),))
    found = generator._beams(item)
    assert tuple(found[0].tokens) == next(pair for pair in best if banned not in pair)


def test_beams_are_ranked_by_the_rewards_and_keep_to_bans(speaker):
    one = speaker("rollout.sampling.no_repeat_ngram=1")
    (answers,) = Generator(one, "beams", 4)([one.item("hello", "hello")], ["hello"])
    assert len(answers.said) == 4
    rewards = [said.reward for said in answers.said]
    assert rewards == sorted(rewards, reverse=True)
    for said in answers.said:
        ids = one.policy.tokenizer.encode("hello" + said.text)
        assert len(said.pieces) <= 12
        assert len(set(ids)) >= len(set("hello"))
    with pytest.raises(ConfigError, match="repetition_penalty"):
        Generator(speaker("rollout.sampling.repetition_penalty=1.2"), "beams", 2)


def test_a_text_by_segments_may_be_longer_than_the_context(speaker):
    lengths = ["rollout.sampling.max_new_tokens=50", "rollout.sampling.min_new_tokens=50"]
    begun = speaker(*lengths).stream("hi", seed=0, on_piece=lambda *_: None)
    long = [setting.replace("50", "200") for setting in lengths]
    one, pieces = speaker(*long, "rollout.sampling.segment={tokens: 50, context: 40}"), []
    text = one.stream("hi", seed=0, on_piece=lambda piece, *_: pieces.append(piece))
    assert text.startswith(begun)
    assert "".join(pieces) == text
    assert (len(pieces), one.policy.context_length) == (200, 128)


def test_a_file_of_prompts_becomes_a_file_of_answers(speaker, model_folder, tmp_path, pertoken, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"say {k}", "a": f"answer {k}"} for k in range(5)] + [{"q": "", "a": "x"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [f"policy.model={model_folder}", "policy.precision=float32", "policy.compile=false", REWARDS,
              "--max-new-tokens", 6, "--prompts", "rows.jsonl"]  # fmt: skip
    code, out, err = pertoken("generate", "Please {q}", *common, "--n", 2, "--to", "out.jsonl")
    assert (code, out) == (0, "10 answers to 5 prompts: out.jsonl\n")
    assert "rows.jsonl:6" in err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in found] == [(f"test-{k}", n) for k in range(1, 6) for n in (0, 1)]
    assert found[0]["prompt"] == "Please say 0"
    assert all(0 < row["tokens"] <= 6 and row["stop"] in ("eos", "length") for row in found)
    code, out, _ = pertoken("generate", "Please {q}", *common, "--best-of", 3, "--answer", "a")
    assert code == 0
    best = [json.loads(line) for line in out.splitlines()]
    assert len(best) == 5
    assert all(row["reward"] == max(row["rewards"]) and len(row["rewards"]) == 3 for row in best)
    code, _, err = pertoken("generate", "Please {q}", *common, "--to", "out.jsonl")
    assert code == 1
    assert "there is such a file already" in err
    items, bad = read_prompts(tmp_path / "rows.jsonl", "Please {q}", chat=False)
    assert (len(items), len(bad)) == (5, 1)
    one = speaker()
    apart = [answers.said[0].text for answers in generate_all(Generator(one), items, at_once=2, seed=4)]
    together = [answers.said[0].text for answers in generate_all(Generator(one), items, at_once=5, seed=4)]
    assert apart == together


def test_the_command_shows_what_there_was_to_choose_from(model_folder, pertoken):
    common = ["generate", "hello", f"policy.model={model_folder}", "policy.precision=float32", "policy.compile=false",
              REWARDS, "--max-new-tokens", 6, "--answer", "hello"]  # fmt: skip
    code, out, _ = pertoken(*common, "--best-of", 3, "--show")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("best ")] == ["best 1", "best 2", "best 3"]
    assert len(out.split("rewards, best first: ")[1].split()) == 3
    code, out, _ = pertoken("generate", "hello", *common[2:], "--temperature", 0)
    assert code == 0
    assert pertoken("generate", "hello", *common[2:], "--temperature", 0, "--seed", 5)[1] == out
    assert pertoken("generate", "hello", *common[2:], "--seed", 5)[1] != out
    code, out, _ = pertoken(*common, "--beams", 2)
    assert code == 0
    assert len(out.split("rewards, best first: ")[1].split()) == 2
    for arguments, words in (
        (["--best-of", 2, "--beams", 2], "--best-of and --beams: one way to generate at a time"),
        (["--n", 2, "--by", "logprob"], "--n and --by"),
        (["--show"], "--show shows what --best-of"),
    ):
        code, _, err = pertoken(*common, *arguments)
        assert code == 2
        assert words in err
