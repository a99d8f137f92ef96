"""What does each reward cost per 1,000 tokens, on one core? Prints the table of docs/rewards.md; --write puts it there.

    python benchmarks/reward_cost.py
    python benchmarks/reward_cost.py --write --causal models/stories260k --facts data/knowledge
    python benchmarks/reward_cost.py --only rouge_l bleu --write    # the other rows of the table stay

The completions are 64 texts of 128 tokens with references of 20 words, and 16 of 1,024 tokens with references of 100
words, in groups of 8, out of the pages of docs/, which have code and tables in them; rewards that ask a model are
measured on fewer of them (`FEW`). Alignment is a row of its own: it is done once for all rewards. What counts is the
time of this process's processor: a server (LanguageTool, a judge) is a stub here that answers at once, and its own
work is not in the table.

Rewards with a model get the MiniLM of the extra `semantics` (--encoder), with heads that are as good as untrained: a
trained one costs the same. --causal is the folder of a causal language model, --facts a folder with `relations.jsonl`
(patterns) and `train.jsonl` (rows whose `meta` has subject, relation and object). What is not given is not measured.
"""

import argparse
import dataclasses
import json
import multiprocessing
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from pertoken.errors import MissingExtraError, PertokenError, RewardError
from pertoken.policy.model import load_model
from pertoken.rewards import Learns, Scene, WarmsUp, resolve
from pertoken.rewards.names import BUILT_IN
from pertoken.rewards.semantics import EMBEDDED, minilm_folder
from pertoken.rewards.token_model import TokenScorer
from pertoken.types import Episode, Item, PolicyOutput, TokenBatch

DOCS = Path(__file__).parents[1] / "docs"
PART = re.compile(r"(<!-- cost -->\n).*?(<!-- end -->)", re.DOTALL)
SIZES = {128: (64, 20), 1024: (16, 100)}
"""Tokens per completion: number of completions, words per reference."""
FEW = {
    "bertscore": (4, 1), "documents": (4, 1), "entailment": (8, 1), "similarity": (16, 2), "classifier": (16, 4),
    "token_model": (16, 4), "link_grammar": (64, 8), "ter": (64, 4), "prime": (2, 1),
}  # fmt: skip
"""Rewards that take long: number of completions at each size."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "length": {"max_words": 50},
    "overlong": {"max_tokens": 128, "buffer": 32},
    "format": {"parts": ["[0-9]+"], "json": True},
    "banned": {"words": ["delve", "as an AI model"]},
    "readability": {"most": 8.0},
    "ensemble": {"members": [{"name": "rouge_l"}, {"name": "chrf"}]},
    "each_turn": {"reward": {"name": "rouge_l"}},
}
"""Settings without which a reward has nothing to do."""
SLOW = [
    ("ter", "shifts", "every"), ("bertscore", "granularity", "word"), ("bertscore", "granularity", "token"),
    ("similarity", "granularity", "word"),
]  # fmt: skip
"""Settings that are measured at the smaller size only."""


MODEL = "smollm2-135m-instruct"
"""Whose tokens they are."""

METRIC = """
import datasets
import evaluate


class Metric(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"same": float(predictions[0] == references[0])}
"""

Ways = list[tuple[str, dict[str, Any]]]
"""How a reward is measured: what the table says of the settings, and the settings."""


class Needs:
    """What rewards need that is no setting: models, a graph, documents, servers. All of it is made in `place`."""

    def __init__(self, place: Path, *, encoder: str, causal: str | None, facts: str | None, port: int) -> None:
        self._place, self._causal, self._knowledge, self._port = place, causal, facts, port
        self._encoder = encoder
        self._name = encoder if encoder == EMBEDDED else Path(encoder).name

    def ways(self, name: str) -> Ways | str:
        """Of a reward that needs something; else why it cannot be measured; no ways if it needs nothing."""
        of = getattr(self, f"_{name}", None)
        return [] if of is None else of()

    def _path(self) -> str:
        return str(minilm_folder()) if self._encoder == EMBEDDED else self._encoder

    def _similarity(self) -> Ways | str:
        return [("", {"model": self._encoder}), ("`granularity: word`", {"granularity": "word"})]

    def _bertscore(self) -> Ways | str:
        ways = ({"granularity": "word"}, {"granularity": "token"}, {"granularity": "text"})
        return [(_said(way), {"model": self._encoder, **way}) for way in ways]

    def _classifier(self) -> Ways | str:
        model = self._head("classifier", ["bad", "good"])
        ways = ({}, {"granularity": "sentence"})
        return [(_and(self._name, way), {"model": model, "label": "good", **way}) for way in ways]

    def _entailment(self) -> Ways | str:
        model = self._head("nli", ["contradiction", "entailment", "neutral"])
        return [(f"{self._name} against the reference", {"model": model, "against": "reference"})]

    def _token_model(self) -> Ways | str:
        from transformers import AutoModel, AutoTokenizer

        folder = self._place / "token_model"
        if not folder.exists():
            folder.mkdir()
            trunk, tokenizer = AutoModel.from_pretrained(self._path()), AutoTokenizer.from_pretrained(self._path())
            TokenScorer(trunk, tokenizer).save(folder, {})
        return [(self._name, {"path": str(folder)})]

    def _head(self, name: str, labels: list[str]) -> str:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = self._place / name
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(
                self._path(), num_labels=len(labels), id2label=dict(enumerate(labels))
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(self._path()).save_pretrained(folder)
        return str(folder)

    def _perplexity(self) -> Ways | str:
        return [(Path(self._causal).name, {"model": self._causal})] if self._causal else "a pass of its model"

    def _implicit(self) -> Ways | str:
        if self._causal is None:
            return "a pass of each of its two models"
        return [(f"{Path(self._causal).name} twice", {"model": self._causal, "reference": self._causal})]

    def _prime(self) -> Ways | str:
        said = f"{MODEL} twice, and an update of one of them"
        return [(said, {"model": MODEL, "outcome": "right"})]

    def _comet(self) -> Ways | str:
        return "a pass of its model, in the process of another Python"

    def _facts(self) -> Ways | str:
        if self._knowledge is None:
            return "as its graph"
        graph, folder = self._place / "facts.jsonl", Path(self._knowledge)
        rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        graph.write_text("\n".join(json.dumps(json.loads(row)["meta"]) for row in rows), encoding="utf-8")
        said = f"a graph of {len(rows):,} facts"
        return [(said, {"graph": str(graph), "patterns": str(folder / "relations.jsonl")})]

    def _documents(self) -> Ways | str:
        model = self._head("nli", ["contradiction", "entailment", "neutral"])
        base = {"path": str(DOCS)}
        return [
            ("the pages of docs/", base),
            ("`search: meaning`", base | {"search": "meaning", "embeddings": self._encoder}),
            (f"`model`: {self._name}", base | {"model": model}),
        ]

    def _evaluate(self) -> Ways | str:
        folder = self._place / "same"
        folder.mkdir(exist_ok=True)
        (folder / "same.py").write_text(METRIC, encoding="utf-8")
        return [("a metric that compares strings", {"metric": str(folder)})]

    def _language_tool(self) -> Ways | str:
        return [("without the server's work", {"url": f"http://127.0.0.1:{self._port}"})]

    def _judge(self) -> Ways | str:
        url = f"http://127.0.0.1:{self._port}/v1"
        settings = {"url": url, "model": "none", "rubric": "Good texts are good.", "remember": False}
        return [("without the model's work", settings)]


def _said(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in parameters.items())


def _and(name: str, parameters: Mapping[str, Any]) -> str:
    return ", ".join(part for part in (name, _said(parameters)) if part)


class _Stub(BaseHTTPRequestHandler):
    """A LanguageTool server and a chat end point that find nothing, at once."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        verdict = {"role": "assistant", "content": '{"score": 5, "findings": []}'}
        chat = {"id": "1", "object": "chat.completion", "created": 0, "model": "none"}
        chat |= {"choices": [{"index": 0, "finish_reason": "stop", "message": verdict}]}
        body = json.dumps({"matches": []} if self.path.startswith("/v2") else chat).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _serve(pipe: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stub)
    pipe.send(server.server_port)
    server.serve_forever()


def settings(name: str) -> Iterator[dict[str, Any]]:
    """The ways in which a reward is measured: as it comes, per token, and where a setting changes its cost."""
    fields = {field.name for field in dataclasses.fields(resolve(name))}
    base = PARAMETERS.get(name, {})
    yield base
    if "granularity" in fields:
        yield base | {"granularity": "token"}
    if "word_order" in fields:
        yield base | {"word_order": 2}
    if "shifts" in fields:
        yield base | {"shifts": "every"}


def scene(num_tokens: int, tokenizer: Any, *, num_rows: int | None = None, skipped: int = 0) -> Scene:
    """Completions cut out of the pages, with references cut out of them elsewhere."""
    most, num_words = SIZES[num_tokens]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    ids, words = tokenizer.encode(text, add_special_tokens=False), text.split()
    episodes = []
    num_rows = num_rows or most
    for row in range(skipped, skipped + num_rows):
        start, word = row * 997 % (len(ids) - num_tokens), row * 499 % (len(words) - num_words)
        tokens = [ids[0], *ids[start : start + num_tokens]]
        item = Item(id=str(row // 8), prompt="?", answer=" ".join(words[word : word + num_words]))
        acts, zeros = [False] + [True] * num_tokens, [0.0] * (num_tokens + 1)
        episodes.append(Episode(str(row), item, row // 8, tokens, acts, zeros, zeros, [], "length", (0, 0)))
    shape = (num_rows, num_tokens + 1)
    mask = torch.tensor([episode.action_mask for episode in episodes])
    batch = TokenBatch(
        tokens=torch.tensor([episode.tokens for episode in episodes]),
        attention_mask=torch.ones(shape, dtype=torch.bool),
        action_mask=mask,
        sample_logprobs=torch.zeros(shape),
        env_rewards=torch.zeros(shape),
        turn=torch.zeros(shape, dtype=torch.int),
        group=torch.tensor([episode.group for episode in episodes]),
        terminated=torch.zeros(num_rows, dtype=torch.bool),
        episode_ids=tuple(episode.id for episode in episodes),
    )
    policy = PolicyOutput(torch.zeros(shape), torch.zeros(shape))
    return Scene(batch, episodes, tokenizer, old=policy, ref=policy)


def seconds(run: Any) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def measure(only: list[str], needs: Needs) -> list[str]:
    """The rows of the table."""
    torch.set_num_threads(1)
    tokenizer = load_model(MODEL)[1]
    scenes = {size: scene(size, tokenizer) for size in SIZES}
    costs = [
        1000 * seconds(lambda each=each: each.samples) / (each.batch.num_actions / 1000) for each in scenes.values()
    ]
    rows = [_row("alignment", "", costs)]
    for name in only or BUILT_IN:
        try:
            given = needs.ways(name)
            ways = given or [(_said(parameters), parameters) for parameters in settings(name)]
        except MissingExtraError as error:
            ways = str(error)
        if isinstance(ways, str):
            rows.append(_row(f"`{name}`", ways, []))
            print(rows[-1], flush=True)
            continue
        for said, parameters in ways:
            try:
                reward = resolve(name)(**parameters)
            except PertokenError as error:  # a package or a library that is not here
                rows.append(_row(f"`{name}`", str(error), []))
            else:
                slow = any((name, key, value) in SLOW for key, value in parameters.items())
                few = dict(zip(SIZES, FEW.get(name, [most for most, _ in SIZES.values()]), strict=True))
                rows.append(_row(f"`{name}`", said, _costs(reward, few, tokenizer, twice=not given, slow=slow)))
            print(rows[-1], flush=True)
    return rows


def _costs(reward: Any, few: Mapping[int, int], tokenizer: Any, *, twice: bool, slow: bool) -> list[float]:
    """Milliseconds per 1,000 tokens at each size. `twice`: the better of two runs at the first size, of a reward that
    remembers no text."""
    if isinstance(reward, WarmsUp):
        reward.warm_up()
    sizes = list(few)[:1] if slow else list(few)
    first = scene(sizes[0], tokenizer, num_rows=2, skipped=SIZES[sizes[0]][0])
    reward(first)  # other texts: what is loaded at the first use is no cost of a text
    found = []
    for size in sizes:
        each = scene(size, tokenizer, num_rows=few[size])
        _ = each.samples  # alignment has a row of its own
        try:
            spent = seconds(lambda each=each: _whole(reward, each))
            if twice and size == sizes[0]:
                spent = min(spent, seconds(lambda each=each: reward(each)))
        except RewardError as error:  # longer than the context of a model
            print(f"  {size} tokens: {error}", flush=True)
            break
        found.append(1000 * spent / (each.batch.num_actions / 1000))
    return found


def _whole(reward: Any, each: Scene) -> None:
    """All that a step asks of a reward: its values, and that it learns, if it does."""
    reward(each)
    if isinstance(reward, Learns):
        reward.learn(each, {reward.outcome: torch.arange(len(each.episodes)) % 2.0})


def _row(name: str, parameters: str, costs: list[float]) -> str:
    cells = [f"{cost:.3g}" if cost < 1000 else f"{cost:.0f}" for cost in costs] + ["not measured"] * (
        len(SIZES) - len(costs)
    )
    return f"| {name} | {parameters} | {' | '.join(cells)} |"


def _kept(rows: list[str], page: str) -> list[str]:
    """`rows`, and those of the page for the rewards that were not measured now, in the order of the built-in names."""
    found = PART.search(page)
    old = [line for line in found[0].splitlines() if line.startswith(("| `", "| alignment"))] if found else []
    measured = {_name(row) for row in rows}
    rows = rows + [row for row in old if _name(row) not in measured]
    order = {name: k for k, name in enumerate(["alignment", *(f"`{name}`" for name in BUILT_IN)])}
    return sorted((row for row in rows if _name(row) in order), key=lambda row: order[_name(row)])


def _name(row: str) -> str:
    return row.split("|")[1].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of rewards")
    parser.add_argument("--write", action="store_true", help="put the table into docs/rewards.md")
    parser.add_argument(
        "--encoder", default=EMBEDDED, help="a sentence-transformers model: the embedded one or a folder"
    )
    parser.add_argument("--causal", help="folder of a causal language model, for `perplexity` and `implicit`")
    parser.add_argument("--facts", help="folder with relations.jsonl and train.jsonl, for `facts`")
    arguments = parser.parse_args()
    page = DOCS / "rewards.md"
    old = page.read_text(encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(there,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as place:
        needs = Needs(
            Path(place), encoder=arguments.encoder, causal=arguments.causal, facts=arguments.facts, port=here.recv()
        )
        rows = measure(arguments.only, needs)
    server.terminate()
    if arguments.only and arguments.write:
        rows = _kept(rows, old)
    head = "| reward | settings | 128 tokens each | 1,024 tokens each |\n|---|---|---|---|\n"
    table = head + "\n".join(rows) + "\n"
    table = (
        f"Milliseconds per 1,000 tokens, one core of {platform.machine()}, Python {platform.python_version()}:\n\n"
        + table
    )
    print("\n" + table)
    if arguments.write:
        page.write_text(PART.sub(lambda part: f"{part[1]}\n{table}\n{part[2]}", old), encoding="utf-8")


if __name__ == "__main__":
    main()
