"""How fast the page of a large run opens and scrolls, measured in headless Chromium.

    python benchmarks/big_run.py                                # 10,000 samples of 512 tokens, in the studio
    python benchmarks/big_run.py --report                       # and the page that `pertoken report` makes of them
    python benchmarks/big_run.py --folder runs/mine-0           # a run that is there
    python benchmarks/big_run.py --samples 1000 --no-index      # as an older version left it: the index is made first

The run is made up, its folder is not: episodes and evaluations go through the writers that a run uses, 32 samples in
groups of four a step, three parts of the reward and nine other streams for each token.

Each opening is a page of its own in one browser: from going to the address to the first sample in the list, and to the
first text with its tokens coloured; beside it the processor time of the server and of all processes of the browser,
which says what a machine with a core to spare needs. Scrolling turns the wheel over the list for some seconds, once
slowly and once as fast as it goes; frames are counted by `requestAnimationFrame`.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from pertoken.tracking import RunLog, episode_record
from pertoken.tracking.files import Row
from pertoken.tracking.report import write_report
from pertoken.types import Episode, Item, Span

PROMPT_TOKENS, PER_STEP, PER_GROUP, HELD_OUT = 64, 32, 4, 128
WORDS = ["the", "a", "value", "list", "returns", "key", "of", "given", "number", "sorted", "when", "is", "each", "file"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-renderer-priority-management", "--disable-renderer-backgrounding"]  # fmt: skip


def make_run(folder: Path, samples: int, tokens: int) -> None:
    """A run folder with so many samples, each of so many tokens."""
    draw = np.random.default_rng(0)
    log = RunLog.create(folder, config_text="name: big\n", seed=0, about={"model": "made up", "task": "words"})
    items = [Item(f"item-{k}", f"Say what number {k} is.", f"It is the value of {k}.") for k in range(1000)]
    steps = -(-samples // PER_STEP)
    for step in range(steps + 1):
        if step in (0, steps):
            log.evaluation(step, "validation", *evaluation(draw, items[:HELD_OUT], tokens))
        if step < steps:
            count = min(PER_STEP, samples - step * PER_STEP)
            rows = [
                record(draw, items[(step * PER_STEP + k) // PER_GROUP % 1000], k // PER_GROUP, step + 1, tokens)
                for k in range(count)
            ]
            log.episodes(step + 1, rows)
            mean = float(np.mean([sum(row["streams"]["reward/total"]) for row in rows]))
            log.step(step + 1, {"reward/total": mean, "kl/reference": 0.01 * step / steps, "entropy": 2.0})
    log.finish("finished", "all steps are done")
    log.close()


def record(draw: np.random.Generator, item: Item, group: int, step: int, tokens: int) -> Row:
    """An episode as a run keeps it."""
    ids = draw.integers(0, len(WORDS), PROMPT_TOKENS + tokens)
    pieces = [f" {WORDS[k]}" for k in ids]
    mask = [False] * PROMPT_TOKENS + [True] * tokens
    episode = Episode(
        id=f"s{step}-{group}",
        item=item,
        group=group,
        tokens=ids.tolist(),
        action_mask=mask,
        logprobs=[0.0] * len(mask),
        env_rewards=[0.0] * len(mask),
        spans=[Span(0, PROMPT_TOKENS, "prompt", 0), Span(PROMPT_TOKENS, len(mask), "action", 0)],
        stop="eos",
        policy_version=(step - 1, step - 1),
    )
    streams = {name: [0.0] * PROMPT_TOKENS + values for name, values in columns(draw, tokens).items()}
    return episode_record(episode, pieces, streams, step=step)


def columns(draw: np.random.Generator, tokens: int) -> dict[str, list[float]]:
    """Twelve streams of one text."""
    parts = {f"reward/{name}": draw.normal(0, 0.05, tokens) for name in ("grammar", "overlap", "length")}
    total = sum(parts.values())
    returns = np.cumsum(total[::-1])[::-1]
    value, ratio = returns + draw.normal(0, 0.1, tokens), np.exp(draw.normal(0, 0.1, tokens))
    found = parts | {
        "reward/total": total, "return": returns, "value": value, "advantage": returns - value,
        "logprob": -draw.exponential(1.2, tokens), "kl": draw.normal(0.05, 0.1, tokens),
        "entropy": draw.exponential(0.8, tokens), "ratio": ratio, "clipped": (abs(ratio - 1) > 0.2).astype(float),
    }  # fmt: skip
    return {name: values.tolist() for name, values in found.items()}


def evaluation(draw: np.random.Generator, items: list[Item], tokens: int) -> tuple[Row, list[Row]]:
    """Held-out items, answered."""
    rows = []
    for item in items:
        made = record(draw, item, 0, 0, tokens)
        kept = {name: made["streams"][name] for name in ("reward/total", "logprob", "entropy", "kl")}
        text = {"prompt": made["prompt"], "answer": item.answer, "output": made["completion"]}
        score = float(draw.uniform())
        rows.append({"id": item.id, **text, "metrics": {"rouge_l": score}, "tokens": made["tokens"], "streams": kept})
    mean = statistics.fmean(row["metrics"]["rouge_l"] for row in rows)
    return {"main": "rouge_l", "metrics": {"rouge_l": mean}}, rows


@contextmanager
def studio(root: Path) -> Iterator[tuple[str, int]]:
    """Address and process of a studio over the runs below `root`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pertoken.cli", "studio", str(root), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


OPENED = """() => {
  const row = document.querySelector('#rows .row');
  const token = document.querySelector('#scene .token[style]');
  window.seen ||= {};
  if (row) window.seen.list ||= performance.now();
  if (token) window.seen.text ||= performance.now();
  return Boolean(row && token);
}"""


def opening(browser: Browser, address: str, server: int | None) -> tuple[Page, dict[str, float]]:
    """A page, and seconds from going there to its list and to its first text; the seconds of processors in between."""
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    begun = processor_seconds(browser, server)
    page.goto(address, wait_until="commit")
    page.wait_for_function(OPENED, polling="raf", timeout=600_000)
    used = {name: after - begun[name] for name, after in processor_seconds(browser, server).items()}
    return page, {name: stamp / 1000 for name, stamp in page.evaluate("seen").items()} | used


def processor_seconds(browser: Browser, server: int | None) -> dict[str, float]:
    """What the processes of the browser and the server have computed so far."""
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    found = {"browser": sum(process["cpuTime"] for process in processes)}
    if server is not None:
        user, system = Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        found["server"] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return found


def choosing(page: Page, count: int) -> list[float]:
    """Seconds from a click on a row far down the list to its text, for rows that the page does not hold yet."""
    script = """async (place) => {
      const list = document.querySelector('#list');
      list.scrollTop = 44 * place;
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
      const row = document.querySelector(`#row-${place}`);
      const begun = performance.now();
      row.click();
      const id = view.id;
      const shown = () => document.querySelector(`#scene .panel[data-id="${id}"] .token[style]`);
      while (!shown() && !document.querySelector('#scene code')) await new Promise(requestAnimationFrame);
      await new Promise(requestAnimationFrame);
      return (performance.now() - begun) / 1000;
    }"""
    page.select_option("#order", label="In order of steps")
    places = page.evaluate("found.length")
    return [page.evaluate(script, (k * 7919 + 13) % places) for k in range(count)]


def scrolling(page: Page, seconds: float, pixels: int) -> dict[str, float]:
    """Frames while the wheel turns over the list, and what they took in milliseconds."""
    page.hover("#list")
    page.evaluate("""() => {
      window.frames_ = [];
      window.going = true;
      let last = performance.now();
      const tick = (now) => { frames_.push(now - last); last = now; if (going) requestAnimationFrame(tick); };
      requestAnimationFrame(tick);
    }""")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page.mouse.wheel(0, pixels)
    times = sorted(page.evaluate("(going = false, frames_.slice(1))"))
    rows = page.evaluate("Math.round(document.querySelector('#list').scrollTop / 44)")
    slow = sum(frame > 50 for frame in times) / len(times)
    return {"frames": len(times), "median ms": statistics.median(times), "p99 ms": times[int(0.99 * (len(times) - 1))],
            "longest ms": times[-1], "share > 50 ms": slow, "rows passed": rows}  # fmt: skip


def megabytes(process: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def told(name: str, values: list[float]) -> None:
    print(f"{name}: median {statistics.median(values):.2f} s, worst {max(values):.2f} s of {len(values)}", flush=True)


def measure(browser: Browser, address: str, opens: int, chosen: int, server: int | None = None) -> Page:
    """Prints all figures of one page; returns it."""
    begun, pages = time.perf_counter(), []
    for _ in range(opens):
        page, seen = opening(browser, address, server)
        pages.append(seen)
        if len(pages) < opens:
            page.close()
    told("to the first sample in the list", [seen["list"] for seen in pages])
    told("to the first text with its tokens", [seen["text"] for seen in pages])
    each = ", ".join(f"{seen['text']:.2f}" for seen in pages)
    print(f"  each: {each}; load average {os.getloadavg()[0]:.1f}")
    for name in ("server", "browser"):
        if name in pages[0]:
            told(f"of processor time for it, {name}", [seen[name] for seen in pages])
    told("from a click to a text", choosing(page, chosen))
    for name, pixels in (("slowly", 60), ("fast", 3000)):
        frames = scrolling(page, 5.0, pixels)
        print(f"scrolling {name}: {', '.join(f'{key} {value:.3g}' for key, value in frames.items())}")
    heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
    print(f"heap of the page: {heap:.0f} MB; measured in {time.perf_counter() - begun:.0f} s", flush=True)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="a run folder that is there, or where the made-up one is to stay")
    parser.add_argument("--opens", type=int, default=9)
    parser.add_argument("--chosen", type=int, default=20, help="texts that are opened from the list")
    parser.add_argument("--report", action="store_true", help="measure report.html too")
    parser.add_argument("--no-index", action="store_true", help="remove the index before the first opening")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "runs" / "big"
        begun = time.perf_counter()
        if not (folder / "run.json").is_file():
            make_run(folder, args.samples, args.tokens)
            print(f"made in {time.perf_counter() - begun:.0f} s")
        size = sum(path.stat().st_size for path in folder.rglob("*.jsonl"))
        index = sum(path.stat().st_size for path in folder.glob("index/*/*"))
        print(f"{folder.name}: {size / 1e6:.0f} MB of samples, {index / 1e6:.1f} MB of index", flush=True)
        if args.no_index:
            shutil.rmtree(folder / "index", ignore_errors=True)
        with sync_playwright() as playwright:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            flags = [*FLAGS, "--enable-precise-memory-info"]
            browser = playwright.chromium.launch(executable_path=path, args=flags)
            with studio(folder) as (address, process):
                print("--- studio")
                if args.no_index:
                    page, seen = opening(browser, f"{address}/run/{folder.name}", process)
                    page.close()
                    print(f"the very first opening, which makes the index: {seen['text']:.2f} s")
                page = measure(browser, f"{address}/run/{folder.name}", args.opens, args.chosen, process)
                begun = time.perf_counter()
                hits = page.evaluate("async () => (await askWords('number 77 is')).size")
                print(f"search through all texts: {time.perf_counter() - begun:.2f} s, {hits} found")
                print(f"memory of the server: {megabytes(process):.0f} MB")
                page.close()
            if args.report:
                begun = time.perf_counter()
                report = write_report(folder)
                seconds = time.perf_counter() - begun
                print(f"--- report.html: {report.stat().st_size / 1e6:.1f} MB, written in {seconds:.1f} s")
                measure(browser, report.resolve().as_uri(), args.opens, args.chosen)
            browser.close()


if __name__ == "__main__":
    main()
