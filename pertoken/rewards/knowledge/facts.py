"""The text against a graph of facts: what it supports earns, what it contradicts costs, all else is neutral."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from pertoken.errors import ConfigError
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.rewards.knowledge.claims import Claim, Pattern, claims, load_patterns
from pertoken.rewards.knowledge.graph import Graph, load_graph, normal


@dataclass(frozen=True)
class Verdict:
    """What the graph says of a claim: 1 supported, -1 contradicted, 0 unknown; and its evidence."""

    sign: int
    evidence: str


@dataclass(frozen=True)
class Facts(SampleReward):
    """Each claim that a pattern sees in the text, by what a graph of facts knows, on the name that completes it.

    A claim is supported if the graph has it. It is contradicted if the graph has another object for this subject, the
    relation allows one only, and the name is an object of that relation elsewhere (a town for a town, but not "1921").
    Everything else is unknown, and neutral. A claim earns once, however often it is repeated; it costs each time.
    """

    graph: str
    """Path of the triples (.jsonl, .json, .csv, .tsv, .parquet, .sqlite, .db), or address of a SPARQL end point."""
    patterns: str
    """Path of JSON lines: a relation, and sentences with [X] (subject) and [Y] (object) that state it."""
    supported: float = 1.0
    """Earned by a claim that the graph has."""
    contradicted: float = -1.0
    """Paid for a claim that the graph contradicts."""
    many: Sequence[str] = ()
    """Relations by which a subject may have several objects, beside those of which the graph itself shows it."""
    continues: bool = False
    """The completion goes on in the sentence of the prompt, so that a claim may begin there."""
    articles: Sequence[str] = ("the", "a", "an")
    """Words that may stand before a name."""
    queries: Mapping[str, str] | None = None
    """Of an end point: its own questions, `objects` and `is_object`, in place of Wikidata's."""
    language: str = "en"
    """Of an end point's names."""

    def __post_init__(self) -> None:
        for name, value, sign in (("supported", self.supported, 1), ("contradicted", self.contradicted, -1)):
            if value * sign < 0:
                raise ConfigError(f"facts.{name}: expected a number {'>=' if sign > 0 else '<='} 0, got {value}")
        for name in ("many", "articles"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"facts.{name}: expected a list, got {getattr(self, name)!r}")
        _ = self._graph, self._patterns  # what is wrong with a file shows before anything is loaded

    @cached_property
    def _graph(self) -> Graph:
        return load_graph(self.graph, queries=self.queries or {}, language=self.language)

    @cached_property
    def _patterns(self) -> tuple[Pattern, ...]:
        return load_patterns(self.patterns)

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One span per claim that ends in the completion, in the order of the text."""
        before = sample.item.prompt if self.continues and isinstance(sample.item.prompt, str) else ""
        text, shift = before + sample.text, len(before)
        read = sorted(claims(text, self._patterns, self._graph, self.articles), key=lambda claim: claim.second)
        earned: set[tuple[str, str, str]] = set()
        found = []
        for _, readings in groupby(read, key=lambda claim: claim.second[0]):
            claim, verdict = self._best(list(readings))
            start, stop = claim.second
            if stop <= shift:
                continue
            value = {1: self.supported, -1: self.contradicted, 0: 0.0}[verdict.sign]
            fact = normal(claim.subject), claim.relation, normal(claim.object)
            message = verdict.evidence
            if verdict.sign > 0 and fact in earned:
                value, message = 0.0, f"{message}, said before"
            earned.add(fact)
            found.append(ScoredSpan(max(start - shift, 0), stop - shift, value, message))
        return found

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample), sample)

    def judge(self, claim: Claim) -> Verdict:
        """What the graph says of one claim."""
        known = self._graph.objects(claim.subject, claim.relation)
        said = f"{claim.subject} — {claim.relation} — {claim.object}"
        if normal(claim.object) in map(normal, known):
            return Verdict(1, f"supported: {said}")
        one = not (claim.relation in self.many or self._graph.has_many(claim.relation))
        if known and one and self._graph.is_object(claim.object, claim.relation):
            return Verdict(-1, f"contradicted: {said}; the graph has {', '.join(known[:3])}")
        return Verdict(0, f"unknown: {said}")

    def _best(self, readings: Sequence[Claim]) -> tuple[Claim, Verdict]:
        """Of the readings of one place, that which says most: supported, else contradicted, else the longest names."""
        longest_first = sorted(readings, key=lambda claim: (claim.first[0], -claim.second[1]))
        judged = [(claim, self.judge(claim)) for claim in longest_first]
        return next((pair for sign in (1, -1) for pair in judged if pair[1].sign == sign), judged[0])
