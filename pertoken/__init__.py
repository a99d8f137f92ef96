"""pertoken: reinforcement learning of language models, one token at a time."""

__version__ = "0.1.0"
