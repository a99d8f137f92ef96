"""Items that come in one stream, or in two that overlap, as splits that do not."""

from collections.abc import Mapping, Sequence

from pertoken.tasks.base import FRACTIONS, ItemTask, Split, split_by
from pertoken.types import Item


def task_of(name: str, given: Mapping[Split, Sequence[Item]], *, seed: int = 0) -> ItemTask:
    """The task of items that were given by split; a prompt that is held out is not learnt from.

    Prompts in test are not in validation or train, those in validation not in train. Where only train is given, or
    nothing of it would be left, the hash of each prompt decides as for your own data.
    """
    held_out = {str(item.prompt) for split in ("validation", "test") for item in given.get(split, ())}
    train = [item for item in given.get("train", ()) if str(item.prompt) not in held_out]
    if not held_out or not train:
        parts: dict[Split, list[Item]] = {"train": [], "validation": [], "test": []}
        for item in given.get("train", ()):
            parts[split_by(str(item.prompt), FRACTIONS, seed)].append(item)
        return ItemTask(name, parts)
    test = list(given.get("test", ()))
    asked = {str(item.prompt) for item in test}
    validation = [item for item in given.get("validation", ()) if str(item.prompt) not in asked]
    return ItemTask(name, {"train": train, "validation": validation, "test": test})
