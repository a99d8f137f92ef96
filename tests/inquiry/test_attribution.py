"""Integrated gradients: by hand on functions whose integral is known, complete on models, and on the right tokens."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaModel,
)

from pertoken.errors import ConfigError, MissingExtraError, ModelError
from pertoken.inquiry import questions
from pertoken.inquiry.attribution import OPEN_SHARE, attribute, policy_attribution, reward_attributions
from pertoken.policy.embedded import embedded
from pertoken.policy.model import Policy
from pertoken.reading import Reading, neutral_id
from pertoken.rewards import Classifier, Sample, TokenModel, Weighted, classifier, token_model, token_reward
from pertoken.rewards.align import align
from pertoken.rewards.token_model import TokenScorer
from pertoken.sampling import Controls
from pertoken.testing import (
    ENCODER_DECODERS,
    FAMILIES,
    byte_tokenizer,
    episode,
    family_model,
    tiny_encoder_decoder,
    tiny_model,
)
from pertoken.types import Item

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh.!"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def captum():
    pytest.importorskip("captum", reason="needs captum, of the extra 'attribution'", exc_type=ImportError)


def reading(text, neutral, score):
    text, neutral = torch.tensor(text), torch.tensor(neutral)
    return Reading(text, neutral, score, [[(k, 1.0)] for k in range(len(text))])


def open_share(found):
    return abs(found.open) / sum(map(abs, found.values))


# --- by hand ------------------------------------------------------------------------------------------------


def test_of_a_linear_score_each_token_has_its_own_difference():
    captum()
    weights = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [3.0, 0.0]])
    one = reading([[1.0, 1.0], [2.0, 4.0], [5.0, 5.0]], [[0.0, 1.0], [0.0, 0.0], [5.0, 5.0]],
                  lambda rows: (rows * weights).sum((1, 2)))  # fmt: skip
    found = attribute([one], 3)
    # 1 x (1 - 0) + 2 x (1 - 1); -1 x 2 + 0.5 x 4; nothing for a token that is neutral itself
    assert found.values == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    # 1 + 2 - 2 + 2 + 15; 0 + 2 + 0 + 0 + 15
    assert (found.score, found.neutral) == pytest.approx((18.0, 17.0), abs=1e-6)
    assert found.open == pytest.approx(0.0, abs=1e-5)


def test_two_tokens_that_need_each_other_have_half_of_it_each():
    captum()
    one = reading([[3.0], [5.0]], [[0.0], [0.0]], lambda rows: rows[:, 0, 0] * rows[:, 1, 0])
    assert attribute([one], 2).values == pytest.approx([7.5, 7.5], abs=1e-4)  # the integral of 3 s x 5 is 15 / 2


def test_scores_of_several_passes_add_up_and_a_token_may_be_shared():
    captum()
    square = Reading(torch.tensor([[2.0]]), torch.tensor([[1.0]]), lambda rows: rows[:, 0, 0] ** 2,
                     [[(0, 0.25), (1, 0.75)]])  # fmt: skip
    line = reading([[1.0], [1.0]], [[0.0], [0.0]], lambda rows: rows.sum((1, 2)))
    found = attribute([square, line], 2, weight=2.0)
    assert found.values == pytest.approx([2 * (0.25 * 3 + 1), 2 * (0.75 * 3 + 1)], abs=1e-4)
    assert (found.score, found.neutral) == pytest.approx((2 * 6.0, 2 * 1.0))


def test_a_score_that_bends_gets_as_many_points_as_it_needs():
    captum()
    smooth = reading([[1.0]], [[-1.0]], lambda rows: rows[:, 0, 0] ** 3)
    steep = reading([[1.0]], [[-1.0]], lambda rows: (200 * (rows[:, 0, 0] - 0.3)).sigmoid())
    assert attribute([smooth], 1).points == 16
    found = attribute([steep], 1)
    assert found.points > 16
    assert open_share(found) <= OPEN_SHARE


def test_the_difference_of_two_attributions_is_that_of_the_scores():
    captum()
    one, other = (
        attribute([reading([[1.0], [2.0]], [[0.0], [0.0]], lambda rows, k=k: k * rows.sum((1, 2)))], 2) for k in (3, 1)
    )
    assert one.minus(other).values == pytest.approx([2.0, 4.0], abs=1e-5)
    assert one.minus(other).score == pytest.approx(6.0, abs=1e-5)


def test_without_captum_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[attribution\]'"):
        attribute([], 0)


def test_the_neutral_token_is_the_mask_else_padding_else_what_there_is():
    assert neutral_id(SimpleNamespace(mask_token_id=None, pad_token_id=0, unk_token_id=1)) == 0
    assert neutral_id(SimpleNamespace(mask_token_id=7, pad_token_id=0)) == 7
    assert neutral_id(SimpleNamespace(eos_token_id=2)) == 2
    with pytest.raises(ModelError, match="nothing neutral"):
        neutral_id(SimpleNamespace())


# --- learned rewards ----------------------------------------------------------------------------------------


def sample_of(text, prompt="?"):
    tokenizer = byte_tokenizer()
    tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
    return Sample(Item("i", prompt), tokens, [True] * len(tokens), align(tokens, tokenizer), "eos")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of letters with a mask token."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16)


@pytest.fixture
def trunks(words):
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=len(PIECES), max_position_embeddings=16, **SIZES)).eval()
    llama = LlamaModel(LlamaConfig(vocab_size=258, num_key_value_heads=2, max_position_embeddings=64, **SIZES)).eval()
    return {"bert": (bert, words), "llama": (llama, byte_tokenizer())}


def use(monkeypatch, trunk, **how):
    torch.manual_seed(1)
    scorer = TokenScorer(*trunk, **how).eval()
    torch.nn.init.normal_(scorer.head.weight)
    monkeypatch.setattr(token_model, "scorer_of", lambda path: scorer)
    return TokenModel("x"), scorer


class Linear(torch.nn.Module):
    """A trunk that looks at one token at a time, so that the reward is linear in what is read."""

    def __init__(self, size):
        super().__init__()
        self.table = torch.nn.Embedding(len(PIECES), size)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=size), model_type="linear")

    def get_input_embeddings(self):
        return self.table

    def forward(self, inputs_embeds=None, input_ids=None, **_):
        return SimpleNamespace(last_hidden_state=self.table(input_ids) if inputs_embeds is None else inputs_embeds)


def test_of_a_linear_reward_each_token_has_what_it_pays_more_than_the_mask(monkeypatch, words):
    captum()
    reward, scorer = use(monkeypatch, (Linear(4), words))
    sample = sample_of("a c b")
    found = attribute(reward.readings(sample), len(sample.tokens))
    paid = reward.token_values(sample)
    mask = (scorer.trunk.table.weight[words.mask_token_id] @ scorer.head.weight[0] + scorer.head.bias[0]).item()
    assert found.values == pytest.approx([cell - mask if cell else 0.0 for cell in paid], abs=1e-5)
    assert found.score == pytest.approx(sum(paid), abs=1e-5)
    assert found.neutral == pytest.approx(3 * mask, abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("how", [{}, {"sign": "cost", "total": "mean"}, {"context": True}])
def test_attributions_sum_to_what_the_reward_pays_more_than_for_neutral_tokens(monkeypatch, trunks, kind, how):
    captum()
    reward, scorer = use(monkeypatch, trunks[kind], **how)
    sample = sample_of("a b c d. ef " * 3, prompt="h g")
    found = attribute(reward.readings(sample), len(sample.tokens))
    assert found.score == pytest.approx(sum(reward.token_values(sample)), abs=1e-4)
    assert sum(found.values) == pytest.approx(found.score - found.neutral, abs=OPEN_SHARE * sum(map(abs, found.values)))
    assert found.values[-1] == 0.0  # the end is no text
    assert len([cell for cell in found.values if cell]) > 10
    if kind == "bert":
        pieces = scorer.encode(sample.text, "h g")
        assert len(pieces) > 1
        blank = [piece.ids.copy() for piece in pieces]
        for piece, ids in zip(pieces, blank, strict=True):
            for column in piece.columns:
                ids[column] = scorer.tokenizer.mask_token_id
        with torch.no_grad():
            wanted = sum(
                scorer([type(piece)(ids, piece.types, piece.columns, piece.spans)]).sum().item()
                for piece, ids in zip(pieces, blank, strict=True)
            )
        count = sum(len(piece.columns) for piece in pieces) if scorer.total == "mean" else 1
        assert found.neutral == pytest.approx(wanted / count, abs=1e-4)


def test_a_token_that_the_model_does_not_look_at_has_nothing(monkeypatch, trunks):
    captum()
    reward, scorer = use(monkeypatch, trunks["llama"])
    scorer._scores = lambda inputs_embeds, **more: (
        TokenScorer._scores(scorer, inputs_embeds=inputs_embeds, **more)
        * torch.arange(inputs_embeds.shape[1]).eq(2)  # the third token alone is paid, and it sees those before it
    )
    found = attribute(reward.readings(sample_of("abcdef")), 7)
    assert all(found.values[:3])
    assert not any(found.values[3:])


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        (["x"], {}),
        (["x"], {"granularity": "sentence"}),
        (["bad", "good", "odd"], {"label": "good"}),
        (["bad", "good"], {"label": "bad", "output": "log_odds", "granularity": "sentence"}),
        (["bad", "good"], {"label": "good", "against": "prompt"}),
    ],
)
def test_attributions_of_a_classifier_sum_to_what_it_pays(labels, how, words, tmp_path):
    captum()
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
    config = BertConfig(vocab_size=len(PIECES), max_position_embeddings=16, num_labels=len(labels),
                        **(names if len(labels) > 1 else {}), **SIZES)  # fmt: skip
    torch.manual_seed(2)
    model = BertForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    classifier.classifier_of.cache_clear()
    reward = Classifier(str(tmp_path), **how)
    for text in ("a b c.", "A b c. D e! " * 3):
        sample = sample_of(text, prompt="h g f")
        found = attribute(reward.readings(sample), len(sample.tokens))
        assert found.score == pytest.approx(sum(reward.token_values(sample)), abs=1e-5)
        assert sum(found.values) == pytest.approx(found.score - found.neutral, abs=max(1e-6, 1.01 * abs(found.open)))
        assert open_share(found) <= OPEN_SHARE
        letters = [k for k, letter in enumerate(sample.text) if letter.lower() in "abcde"]
        assert all(found.values[k] for k in letters)
        assert not found.values[1]  # a space, of which the model's tokens know nothing


# --- policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODER_DECODERS])
def test_the_score_of_what_a_policy_reads_is_its_log_prob(name):
    model = family_model(name)
    policy = Policy(model, byte_tokenizer(), precision="float32", compile=False)
    text = episode([5, 6, 7], [8, 9, 10, 11])
    wanted = torch.tensor(questions.logprobs_of(policy, [text], Controls())[0])
    for columns in ([3, 4, 5, 6], [5], [3]):
        found = embedded(model, text.tokens, columns, prompt=3, neutral=0)
        with torch.no_grad():
            (score,) = found.score(found.embeddings[None])
        assert len(found.embeddings) == columns[-1]
        assert score.item() == pytest.approx(sum(wanted[column - 3].item() for column in columns), abs=1e-3)


def test_attributions_of_a_policy_are_complete_and_those_of_a_swap_of_models():
    captum()
    models = [tiny_model(seed=seed) for seed in (1, 2)]
    tokens = byte_tokenizer().encode("say abc")
    columns, found = [4, 5, 6], []
    for model in models:
        found.append(attribute([embedded(model, tokens, columns, prompt=4, neutral=257)], len(tokens)))
        with torch.no_grad():
            logits = [model(torch.tensor([ids])).logits[0].log_softmax(1) for ids in (tokens, [257] * 7)]
        scores = [sum(logp[column - 1, tokens[column]].item() for column in columns) for logp in logits]
        assert (found[-1].score, found[-1].neutral) == pytest.approx(scores, abs=1e-3)
        assert open_share(found[-1]) <= OPEN_SHARE
        assert all(found[-1].values[:6])
        assert found[-1].values[6] == 0.0  # the last token is written, and read by nobody
    change = found[0].minus(found[1])
    assert sum(change.values) + change.open == pytest.approx(change.score - change.neutral, abs=1e-3)


def test_the_temperature_is_that_of_the_sampler():
    policy = Policy(tiny_model(seed=1), byte_tokenizer(), precision="float32", compile=False)
    text = episode(byte_tokenizer().encode("say"), byte_tokenizer().encode("abc"))
    controls = Controls()
    controls = type(controls)(controls.sampling.model_copy(update={"temperature": 0.5}))
    found = embedded(policy.hf_model, text.tokens, [3, 4, 5], prompt=3, neutral=0, temperature=0.5)
    with torch.no_grad():
        score = found.score(found.embeddings[None]).item()
    assert score == pytest.approx(sum(questions.logprobs_of(policy, [text], controls)[0]), abs=1e-3)


def test_an_encoder_reads_the_prompt_and_a_decoder_what_was_written():
    captum()
    policy = Policy(tiny_encoder_decoder("marian"), byte_tokenizer(), precision="float32", compile=False)
    text = episode([5, 6, 7], [8, 9, 10, 11])
    found = policy_attribution(policy, text)
    known = questions.logprobs_of(policy, [text], Controls())[0]
    assert found.score == pytest.approx(sum(known), abs=1e-3)
    blank = policy.model(input_ids=torch.full((1, 3), 257), decoder_input_ids=torch.full((1, 4), 257)).logits
    neutral = blank[0].log_softmax(1)[range(4), [8, 9, 10, 11]].sum().item()
    assert found.neutral == pytest.approx(neutral, abs=1e-3)
    assert open_share(found) <= OPEN_SHARE
    assert all(found.values[:6])
    assert found.values[6] == 0.0
    second = policy_attribution(policy, text, column=4)
    assert second.score == pytest.approx(known[1], abs=1e-3)
    assert second.values[4:] == (0.0, 0.0, 0.0)


# --- of a sample --------------------------------------------------------------------------------------------


@token_reward
def plain(sample):
    return [1.0] * len(sample.tokens)


def test_parts_of_the_reward_that_have_a_gradient_are_told_with_their_weight_and_the_others_named(monkeypatch, words):
    captum()
    reward, _ = use(monkeypatch, (Linear(4), words))
    ids = byte_tokenizer().encode
    text = episode(ids("?"), ids("a c b"), item=Item("i", "?"))
    parts = [Weighted(plain, 1.0, "plain"), Weighted(reward, 0.5, "learned", clip=(-9.0, 9.0))]
    found, notes = reward_attributions(parts, text, byte_tokenizer(), 1)
    assert list(found) == ["learned"]
    assert found["learned"].score == pytest.approx(0.5 * sum(reward.token_values(sample_of("a c b"))), abs=1e-5)
    assert len(found["learned"].values) == 5
    assert "'plain' has no gradient" in notes[0]
    assert "'learned' is clipped" in notes[1]
    with pytest.raises(ConfigError, match="no part of the reward is a learned model"):
        reward_attributions(parts[:1], text, byte_tokenizer(), 1)


def test_of_a_policy_one_token_or_all_can_be_asked(monkeypatch):
    captum()
    policy = Policy(tiny_model(seed=1), byte_tokenizer(), precision="float32", compile=False)
    ids = byte_tokenizer().encode
    text = episode(ids("say"), ids("abc"))
    wanted = questions.logprobs_of(policy, [text], Controls())[0]
    one, whole = (policy_attribution(policy, text, column=column) for column in (4, None))
    assert one.score == pytest.approx(wanted[1], abs=1e-3)
    assert whole.score == pytest.approx(sum(wanted), abs=1e-3)
    assert all(one.values[:4])
    assert not any(one.values[4:])
    with pytest.raises(ConfigError, match="token 2 is none that the model chose"):
        policy_attribution(policy, text, column=2)
