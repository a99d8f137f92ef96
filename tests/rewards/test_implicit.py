"""The implicit reward: two models, token by token, in the policy's ids or carried over by characters."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.batching import to_batch
from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.rewards import Implicit, Scene, Weighted, score
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode, tiny_model
from pertoken.types import Item


def pair_tokenizer():
    """Bytes, of which some go in pairs: other ids than those of `byte_tokenizer`, and fewer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("c", "a"), ("\u0120", "s")]
    words = [*alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={word: k for k, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with the tokenizer of the policy, two with another one."""
    place = tmp_path_factory.mktemp("implicit")
    for name, tokenizer, seed in (("own", byte_tokenizer(), 1), ("other", pair_tokenizer(), 3)):
        for part in range(2):
            folder = place / f"{name}{part}"
            tiny_model(vocab=len(tokenizer), eos=len(tokenizer) - 1, seed=seed + part).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return place


def scene_of(*texts, prompt="say it", stop="eos"):
    tokenizer = byte_tokenizer()
    rows = [
        episode(
            tokenizer.encode(prompt), tokenizer.encode(text) + [256] * (stop == "eos"), id=f"e{k}{text[:4]}", stop=stop,
            item=Item(f"i{k}", prompt),
        )
        for k, text in enumerate(texts)
    ]  # fmt: skip
    return Scene(to_batch(rows, Controls()), rows, tokenizer)


def log_ratio(place, name, prompt, ids):
    tokens = torch.tensor([[*prompt, *ids]])
    found = []
    for part in range(2):
        model = tiny_model(vocab=tokens_of(name), eos=tokens_of(name) - 1, seed={"own": 1, "other": 3}[name] + part)
        with torch.no_grad():
            logp = model(tokens).logits[0, :-1].log_softmax(-1)
        found.append(logp.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :, 0])
    return found[0] - found[1]


def tokens_of(name):
    return len(byte_tokenizer() if name == "own" else pair_tokenizer())


def test_each_token_has_its_own_log_ratio_and_the_sum_is_that_of_the_text(folders):
    scene = scene_of("the cat", "a")
    values = Implicit(str(folders / "own0"), str(folders / "own1"), beta=0.5)(scene)
    for row, e in enumerate(scene.episodes):
        start = e.prompt_length
        wanted = 0.5 * log_ratio(folders, "own", e.tokens[:start], e.tokens[start:])
        got = values[row, start : len(e.tokens)]
        torch.testing.assert_close(got.float(), wanted, rtol=1e-4, atol=1e-5)
        assert values[row].sum().item() == pytest.approx(wanted.sum().item(), abs=1e-4)
    assert not values[~scene.batch.action_mask].any()
    assert values[scene.batch.action_mask].all()


def test_a_model_against_itself_pays_nothing(folders):
    assert not Implicit(str(folders / "own0"), str(folders / "own0"))(scene_of("the cat")).any()


@pytest.mark.parametrize("stop", ["eos", "length"])
def test_of_other_tokens_each_piece_is_carried_by_its_characters(folders, stop):
    scene = scene_of("the cat s\u00e9", stop=stop)
    values = Implicit(str(folders / "other0"), str(folders / "other1"), beta=1.0)(scene)[0]
    tokenizer = pair_tokenizer()
    ids = tokenizer.encode("the cat s\u00e9") + [tokenizer.eos_token_id] * (stop == "eos")
    wanted = log_ratio(folders, "other", tokenizer.encode("say it"), ids).double()
    start = scene.episodes[0].prompt_length
    got = values[start:]
    torch.testing.assert_close(got[:3], wanted[:1].expand(3) / 3, rtol=1e-4, atol=1e-5)  # "the" is one piece there
    torch.testing.assert_close(got[3], wanted[1], rtol=1e-4, atol=1e-5)  # a blank
    torch.testing.assert_close(got[4:6], wanted[2:3].expand(2) / 2, rtol=1e-4, atol=1e-5)  # "ca"
    if stop == "eos":
        torch.testing.assert_close(got[-1], wanted[-1], rtol=1e-4, atol=1e-5)
    assert values.sum().item() == pytest.approx(wanted.sum().item(), abs=1e-4)


@pytest.mark.parametrize("name", ["own", "other"])
def test_order_and_size_of_the_batch_do_not_matter(folders, name):
    reward = Weighted(Implicit(str(folders / f"{name}0"), str(folders / f"{name}1")), 1.0, "implicit")
    texts = ["the cat", "", "ca the", "s"]

    def values(scene):
        total = score([reward], scene).total
        return {e.id[2:]: total[k, : len(e.tokens)].tolist() for k, e in enumerate(scene.episodes)}

    together = values(scene_of(*texts))
    assert values(scene_of(*texts[::-1])) == together
    assert {key: row for text in texts for key, row in values(scene_of(text)).items()} == together


def test_what_cannot_be_scored_is_named(folders, tmp_path):
    with pytest.raises(ModelError, match=r"implicit.model: '.*nowhere' is no folder of a causal language model"):
        Implicit(str(tmp_path / "nowhere"), str(folders / "own0"))(scene_of("a"))
    with pytest.raises(ModelError, match="have different tokenizers"):
        Implicit(str(folders / "own0"), str(folders / "other0"))(scene_of("a"))
    with pytest.raises(RewardError, match=r"episode 'e0aaaa', item 'i0': 157 tokens, .* the models is 128"):
        Implicit(str(folders / "own0"), str(folders / "own1"))(scene_of("a" * 150))
    with pytest.raises(ConfigError, match=r"implicit.beta"):
        Implicit("a", "b", beta=0.0)
