"""A model of its own that has read prompt and answer: its last look, on the tokens of the policy."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, MambaConfig, MambaModel

from pertoken.batching import to_batch
from pertoken.errors import ModelError
from pertoken.rewards import Scene
from pertoken.rewards.attention import Reader
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode, tiny_model
from pertoken.types import Item


def scene_of(tokenizer, *texts, prompt="say:"):
    rows = [
        episode([1, 2], tokenizer.encode(text, add_special_tokens=False), id=str(k), item=Item(str(k), prompt))
        for k, text in enumerate(texts)
    ]
    return Scene(to_batch(rows, Controls()), rows, tokenizer)


def test_with_the_tokenizer_of_the_policy_it_is_the_last_row_of_the_last_layer(model_folder):
    tokenizer, reader = byte_tokenizer(), Reader.load(str(model_folder))
    got = reader.weights(scene_of(tokenizer, "oh no", ""))
    ids = torch.tensor([tokenizer.encode("say:oh no")])
    model = tiny_model(seed=1)
    model.set_attn_implementation("eager")
    wanted = model(input_ids=ids, output_attentions=True).attentions[-1][0, :, -1].mean(0)
    torch.testing.assert_close(got[0, 2:], wanted[4:].double().detach(), atol=1e-6, rtol=1e-5)
    assert not got[:, :2].any()
    assert not got[1].any()


def test_weights_go_by_characters_to_the_tokens_of_another_tokenizer(model_folder, sentencepiece):
    text, reader = "The cat sat on the mat", Reader.load(str(model_folder))
    one, other = (reader.weights(scene_of(tokenizer, text)) for tokenizer in (byte_tokenizer(), sentencepiece))
    assert one.shape != other.shape
    assert float(one.sum()) == pytest.approx(float(other.sum()), abs=1e-9)


def test_of_a_text_beyond_the_window_the_end_is_read(model_folder):
    reader = Reader.load(str(model_folder))  # 128 positions
    got = reader.weights(scene_of(byte_tokenizer(), "x" * 200))[0, 2:]
    assert (got > 0).tolist() == [False] * 72 + [True] * 128
    assert float(got.sum()) == pytest.approx(1.0, abs=1e-6)


def test_the_trunk_of_a_classifier_can_read(tmp_path, model_folder):
    config = tiny_model().config
    config.pad_token_id, config.num_labels = 257, 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert bool(Reader.load(str(tmp_path)).weights(scene_of(byte_tokenizer(), "ab"))[0, 2:].all())


def test_a_model_without_attention_is_refused_in_words(tmp_path):
    MambaModel(MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not tell how its last layer attends"):
        Reader.load(str(tmp_path))
    with pytest.raises(ModelError, match=r"credit\.model: .* is no model"):
        Reader.load(str(tmp_path / "none"))
