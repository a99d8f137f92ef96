"""External knowledge as a reward: what a text says, held against what is known, with the evidence."""

from pertoken.rewards.knowledge.claims import Claim, Pattern, claims, load_patterns
from pertoken.rewards.knowledge.documents import Documents
from pertoken.rewards.knowledge.facts import Facts
from pertoken.rewards.knowledge.graph import Endpoint, Graph, Triples, load_graph

__all__ = [
    "Claim",
    "Documents",
    "Endpoint",
    "Facts",
    "Graph",
    "Pattern",
    "Triples",
    "claims",
    "load_graph",
    "load_patterns",
]
