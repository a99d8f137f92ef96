"""Checks of what the user brings: data and rewards."""

from pertoken.doctor.base import Probe, Verdict, check, skipped, within
from pertoken.forward import decoder_start
from pertoken.prompts import prompt_ids
from pertoken.reward_check import OPINION, check_reward
from pertoken.types import Item

LONGEST = 50
"""Of how many prompts, the longest by characters, the tokens are counted."""

REWARD_ITEMS = 2


@check(
    "prompts leave room for an answer in the model's context, and chats go through a chat template",
    remedy="Shorten the prompt template, set rollout.max_prompt_tokens, or lower rollout.sampling.max_new_tokens. A "
    "model that was trained on chats needs its tokenizer's chat template (chat_template.jinja in its folder).",
    quick=True,
)
def data(probe: Probe) -> Verdict:
    """The longest prompts, and whether an assistant's turn is opened behind a chat."""
    policy, items = probe.run.policy, probe.run.items
    longest = sorted(items, key=lambda item: -len(str(item.prompt)))[:LONGEST]
    prompts = [prompt_ids(item, policy.tokenizer) for item in longest]
    before = [len(decoder_start(policy.hf_model) or ids) for ids in prompts]
    room, wanted = policy.context_length - max(before), probe.config.rollout.sampling.window
    short = sum(policy.context_length - taken < wanted for taken in before)
    chats = [item for item in longest if not isinstance(item.prompt, str)]
    template = getattr(policy.tokenizer, "chat_template", None)
    bos = policy.tokenizer.bos_token_id
    twice = sum(bos is not None and ids[:2] == [bos, bos] for ids in prompts)
    words = [
        *([f"{short} of the {len(prompts)} longest prompts leave less than {wanted} tokens"] if short else []),
        *(["the chat template does not open the assistant's turn"] if chats and template and not _opens(chats[0], probe)
          else []),
        *([f"{twice} prompts begin twice (with two {policy.tokenizer.bos_token!r})"] if twice else []),
    ]  # fmt: skip
    how = (
        "plain text" if not chats else "through the chat template" if template else "plain, for want of a chat template"
    )
    seen = f"{len(items)} prompts, {how}; the longest leaves {room} tokens"
    return Verdict("fail" if words else "pass", float(short), 0.0, "prompts", "; ".join(words) or seen)


def _opens(item: Item, probe: Probe) -> bool:
    """Whether the template adds something behind the last message, for the model to go on from."""
    tokenizer, messages = probe.run.policy.tokenizer, [dict(m) for m in item.prompt if not isinstance(m, str)]
    opened, bare = (
        str(tokenizer.apply_chat_template(messages, add_generation_prompt=flag, tokenize=False))
        for flag in (True, False)
    )
    return len(opened) > len(bare)


@check(
    "rewards are finite and the same whatever else is in the batch, for odd, empty and cut-off completions too",
    remedy="Make the part that is named a function of its own sample (no counters, no statistics over the batch), let "
    "it return 0.0 where there is nothing to judge, and try it alone: pertoken reward check.",
)
def rewards(probe: Probe) -> Verdict:
    """Every part, tried on made-up completions of the task's own items (`pertoken reward check`)."""
    with_answer = [item for item in probe.run.items if item.answer][:REWARD_ITEMS]
    items = with_answer or list(probe.run.items[:REWARD_ITEMS])
    if not probe.run.rewards:
        return skipped("no reward is configured")
    broken, asked = [], 0
    for part in probe.run.rewards:
        for verdict in check_reward(part, probe.run.policy.tokenizer, items).verdicts:
            asked += 1
            # A part without an opinion of these few texts may have one of others.
            if verdict.broken and verdict.promise != OPINION:
                broken.append(f"{part.name}: {verdict.promise}: {verdict.broken}")
    return within(
        len(broken), 0, "promises", seen=f"{asked} promises of {len(probe.run.rewards)} parts", wrong="; ".join(broken)
    )
