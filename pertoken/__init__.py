"""pertoken: reinforcement learning of language models, one token at a time.

The front door; everything behind it is importable on its own:

    from pertoken import RunConfig, train
    result = train(RunConfig(name="first", stop={"steps": 20}))
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "evaluate", "load_config", "train"]

_HOME = {"RunConfig": "config", "load_config": "config", "train": "jobs.run", "evaluate": "jobs.run"}


def __getattr__(name: str) -> Any:
    """Load a public name at first use, so that `import pertoken.credit` does not pull in transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'pertoken' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pertoken.{_HOME[name]}"), name)
