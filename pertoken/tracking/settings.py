"""A configuration file as single settings: dotted names and their values as text."""

from typing import Any

import yaml

MOST = 20_000
"""Settings of one file: a few lines of aliases can stand for billions, or for themselves."""


def settings_of(text: str) -> dict[str, str]:
    """The settings of a `config.yaml`, in its order; parts of a list are counted from 0. Nothing if it is none.

    >>> settings_of("seed: 1\\nstop: {steps: 3}\\nrewards: [{name: bleu}]")
    {'seed': '1', 'stop.steps': '3', 'rewards.0.name': 'bleu'}
    """
    try:
        left: list[tuple[str, Any]] = [("", yaml.safe_load(text))]
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    found: dict[str, str] = {}
    seen = 0
    while left:
        name, value = left.pop()
        seen += 1
        if seen > MOST or len(name) > 1000:
            return {}
        if isinstance(value, dict | list) and value:
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            left += reversed([(f"{name}.{key}" if name else str(key), of) for key, of in inner])
        elif name:
            found[name] = str(value)
    return found
