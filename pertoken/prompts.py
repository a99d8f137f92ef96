"""The ids that a model is prompted with."""

from typing import Any

from pertoken.errors import ModelError
from pertoken.types import Item


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """The ids that the model is prompted with: text as it is, messages through the chat template.

    A model without a chat template takes a single message as plain text; a conversation it cannot take.
    """
    if isinstance(item.prompt, str):
        return list(tokenizer.encode(item.prompt))
    if not tokenizer.chat_template:
        if len(item.prompt) == 1:
            return list(tokenizer.encode(item.prompt[0]["content"]))
        raise ModelError(
            f"item {item.id}: its prompt is a conversation of {len(item.prompt)} messages, but this tokenizer has no "
            "chat template. Give the task a plain text prompt instead."
        )
    text = tokenizer.apply_chat_template([dict(m) for m in item.prompt], add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))
