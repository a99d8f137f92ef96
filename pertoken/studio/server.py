"""The web server: which address shows what, who does the work, and how long it lives.

Pages and figures are read from run folders in a few threads. Whatever needs a model waits in line for one thread, which
keeps the models of the run that was asked last.
"""

import asyncio
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from pertoken.errors import ConfigError, MissingExtraError, PertokenError, RunFolderError
from pertoken.inquiry.asking import Answers
from pertoken.studio import pages
from pertoken.studio.guard import Guard, is_local
from pertoken.studio.launching import begin, groups, launch, prepared
from pertoken.studio.listing import Listing
from pertoken.studio.wishes import LAUNCH, MOST_BYTES, QUESTIONS, SPEAK, Speak
from pertoken.tracking.files import encode
from pertoken.tracking.lock import ask_to_end, is_locked, writer
from pertoken.tracking.reader import RunReader
from pertoken.tracking.report import plotly_source
from pertoken.tracking.samples import samples_with


class _Gone(Exception):  # noqa: N818 - no error: the reader has left
    pass


class Studio:
    """What the addresses do. Requests and responses are Starlette's."""

    def __init__(self, root: Path) -> None:
        self.listing = Listing(root)
        self.page_token = ""
        self._worker = ThreadPoolExecutor(1, "pertoken-model")
        self._asked: Answers | None = None

    # --- looking -------------------------------------------------------------------------------------------

    def home(self, request: Any) -> Any:
        return _html(pages.list_page(str(self.listing.root), self.listing.lines(), self._facts))

    def runs(self, request: Any) -> Any:
        """The table, for a page that shows it already."""
        return _json({"table": pages.table(self.listing.lines())})

    def run(self, request: Any) -> Any:
        name, folder = self._run_of(request)
        return _html(pages.run_page(name, RunReader(folder), self._facts))

    def live(self, request: Any) -> Any:
        """What has changed since the page was made."""
        return _json(pages.changes(RunReader(self._run_of(request)[1]), request.query_params))

    def scene(self, request: Any) -> Any:
        """The texts of one sample, which are too many for the page to have them all."""
        return _json(pages.scene(RunReader(self._run_of(request)[1]), request.query_params.get("sample", "")[:200]))

    def find(self, request: Any) -> Any:
        """The samples that have some words in their texts."""
        reader, words = RunReader(self._run_of(request)[1]), request.query_params.get("words", "")[:1000]
        return _json({"ids": samples_with(reader, words)})

    def plotly(self, request: Any) -> Any:
        """What draws the charts: the browser keeps it, asks whether it has changed, and gets it once."""
        from starlette.responses import Response

        source = plotly_source().encode()
        mark = f'"{zlib.crc32(source):x}"'
        headers = {"ETag": mark, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304, headers=headers)
        return Response(source, headers=headers, media_type="text/javascript")

    def compare(self, request: Any) -> Any:
        names = dict.fromkeys(request.query_params.getlist("run"))
        runs = {name: RunReader(self.listing.folder(name)) for name in names}
        return _html(pages.compare_page(runs, self._facts))

    def playground(self, request: Any) -> Any:
        return _html(pages.playground_page(list(self.listing.folders()), self._facts))

    def models(self, request: Any) -> Any:
        """The models of a run that can be asked."""
        return _json({"models": Answers(self._run_of(request)[1]).models()})

    # --- asking --------------------------------------------------------------------------------------------

    async def ask(self, request: Any) -> Any:
        """A question of `questions.py`; answers come one after the other."""
        folder, question = self._run_of(request)[1], await _body(request, QUESTIONS)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._worker, lambda: question.put(self._answers(folder)))
        return _json({"answer": to_jsonable_python(found)})

    async def speak(self, request: Any) -> Any:
        """A sample, token by token: a line of JSON for each."""
        from starlette.responses import StreamingResponse

        folder, wish = self._run_of(request)[1], await _body(request, SPEAK)
        work = partial(self._speak, folder, wish)
        return StreamingResponse(_lines(self._worker, work), media_type="application/x-ndjson")

    def _speak(self, folder: Path, wish: Speak, tell: Callable[[dict[str, Any]], None]) -> None:
        speaker = self._answers(folder).speaker(wish.sampling, model=wish.model, chat=wish.chat)

        def piece(text: str, logprob: float, entropy: float) -> None:
            tell({"piece": text, "logprob": logprob, "entropy": entropy})

        speaker.stream(wish.prompt, seed=wish.seed, on_piece=piece)

    def _answers(self, folder: Path) -> Answers:
        """The run, its models loaded if it was asked before; in the thread of the models alone."""
        if self._asked is None or self._asked.folder != folder:
            self._asked = None  # its models go before others come
            self._asked = Answers(folder)
        return self._asked

    # --- doing ---------------------------------------------------------------------------------------------

    def stop(self, request: Any) -> Any:
        """Let the run end its step, save, and end."""
        return _json({"said": f"asked {ask_to_end(self._run_of(request)[1])} to end its step, save, and end"})

    def resume(self, request: Any) -> Any:
        """Go on with a run, in a process that outlives this one."""
        folder = self._run_of(request)[1]
        if is_locked(folder):
            raise RunFolderError(f"{folder} is being written by {writer(folder)}")
        log = folder / "studio.log"
        process = begin(["--resume", str(folder)], log)
        return _json({"said": f"process {process} goes on with the run; what it says is in {log}"})

    def new(self, request: Any) -> Any:
        return _html(pages.new_page(list(self.listing.folders()), groups(), self._facts))

    async def launch(self, request: Any) -> Any:
        """Say what a new run would be, or start it."""
        wish = await _body(request, LAUNCH)
        base = self.listing.folder(wish.base) if wish.base else None
        config, said = prepared(self.listing.root, base, wish.settings), ""
        if wish.start:
            process, log = launch(self.listing.root, config)
            said = f"process {process} trains in {config.run_folder}; what it says is in {log}"
        return _json({"said": said or f"would train in {config.run_folder}", "config": config.to_yaml()})

    # --- the rest ------------------------------------------------------------------------------------------

    @property
    def _facts(self) -> dict[str, Any]:
        return {"token": self.page_token}

    def _run_of(self, request: Any) -> tuple[str, Path]:
        name = request.path_params["name"]
        return name, self.listing.folder(name)


def application(root: Path, host: str = "127.0.0.1") -> Guard:
    """The ASGI application over the runs below `root`, to be served at `host`."""
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError("starlette", "studio", "the studio") from error
    studio = Studio(root)
    looks = {
        "/": studio.home, "/runs.json": studio.runs, "/new": studio.new, "/compare": studio.compare,
        "/playground": studio.playground, pages.PLOTLY: studio.plotly,
        "/run/{name:path}": studio.run, "/live/{name:path}": studio.live, "/models/{name:path}": studio.models,
        "/scene/{name:path}": studio.scene, "/find/{name:path}": studio.find,
    }  # fmt: skip
    does = {
        "/ask/{name:path}": studio.ask, "/speak/{name:path}": studio.speak, "/stop/{name:path}": studio.stop,
        "/resume/{name:path}": studio.resume, "/launch": studio.launch,
    }  # fmt: skip
    routes = [Route(path, endpoint) for path, endpoint in looks.items()]
    routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in does.items()]
    guard = Guard(Starlette(routes=routes, exception_handlers={PertokenError: _refused}), host)
    studio.page_token = guard.page_token
    return guard


def serve(root: Path, *, host: str, port: int, on_address: Callable[[str], None]) -> None:
    """Serve the runs below `root` until Ctrl-C; `on_address` hears where, as soon as it can be opened.

    Raises ConfigError if the address cannot be had.
    """
    try:
        from uvicorn import Config, Server
    except ImportError as error:
        raise MissingExtraError("uvicorn", "studio", "the studio") from error
    guard = application(root, host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: {(error.strerror or str(error)).lower()}; choose another"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    token = "" if is_local(host) else f"?token={guard.access_token}"
    on_address(f"http://{shown}:{listening.getsockname()[1]}/{token}")
    config = Config(guard, log_level="warning", access_log=False, server_header=False, lifespan="off",
                    timeout_graceful_shutdown=3)  # fmt: skip
    Server(config).run(sockets=[listening])


async def _lines(
    worker: ThreadPoolExecutor, work: Callable[[Callable[[dict[str, Any]], None]], None]
) -> AsyncIterator[bytes]:
    """What `work` tells in the thread of the models, as lines of JSON; it ends when nobody reads any more."""
    loop, told, gone = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), threading.Event()

    def tell(row: dict[str, Any] | None) -> None:  # hears in the other thread whether anybody is left
        if gone.is_set():
            raise _Gone
        loop.call_soon_threadsafe(told.put_nowait, row)

    def run() -> None:
        try:
            tell({"begun": True})
            work(tell)
            tell(None)
        except _Gone:
            pass
        except Exception as error:  # told to the page; there is nobody else
            said = str(error) if isinstance(error, PertokenError) else f"{type(error).__name__}: {error}"
            loop.call_soon_threadsafe(told.put_nowait, {"error": said})
            loop.call_soon_threadsafe(told.put_nowait, None)

    worker.submit(run)
    try:
        while (row := await told.get()) is not None:
            yield encode(row)
    finally:
        gone.set()


async def _body(request: Any, kind: TypeAdapter[Any]) -> Any:
    """What a page has sent, checked. ConfigError, in words, if it cannot be."""
    sent = b""
    async for chunk in request.stream():
        sent += chunk
        if len(sent) > MOST_BYTES:
            raise ConfigError(f"expected at most {MOST_BYTES} bytes")
    try:
        return kind.validate_json(sent)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _refused(request: Any, error: Exception) -> Any:
    """A named error as the answer: a sentence."""
    status = 404 if isinstance(error, RunFolderError) else 400
    if "text/html" in request.headers.get("accept", ""):
        return _html(pages.problem_page(str(error)), status)
    return _json({"error": str(error)}, status)


def _json(row: dict[str, Any], status: int = 200) -> Any:
    from starlette.responses import Response

    return Response(pages.as_json(row), status, media_type="application/json")


def _html(text: str, status: int = 200) -> Any:
    from starlette.responses import HTMLResponse

    return HTMLResponse(text, status)
