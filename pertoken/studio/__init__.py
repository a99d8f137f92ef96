"""A local web application over a folder of runs: what they did, what they do, and questions to their models."""

from pertoken.studio.server import serve

__all__ = ["serve"]
