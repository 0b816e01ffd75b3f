"""The application: all protocols on one port, health checks, errors in each protocol's format, the server process."""

import functools
import logging
import os
import signal
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from acestep_jax.errors import InputError
from acestep_jax.io.files import DISK_FULL
from acestep_jax.serve import authors, chat, cpp, native, page, plans, uploads
from acestep_jax.serve.engine import BatchReport
from acestep_jax.serve.envelope import envelope
from acestep_jax.serve.errors import error_body
from acestep_jax.serve.http import protocol
from acestep_jax.serve.metrics import CONTENT_TYPE, Metrics
from acestep_jax.serve.polls import Polls
from acestep_jax.serve.security import COOKIE, LINK_SECONDS, Guard, Keys
from acestep_jax.serve.service import Busy, Closing, Service
from acestep_jax.serve.waiting import RETRY_SECONDS

logger = logging.getLogger(__name__)

MAX_KEY = 4096  # bytes
DESCRIPTION = "Songs from text, by ACE-Step 1.5 in JAX."


class Application(FastAPI):
    """FastAPI behind `front`, which handles every request first; polls end there."""

    front: Guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.front(scope, receive, send)


def create(
    service: Service,
    keys: Keys,
    *,
    version: str,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    metrics: Metrics | None = None,
    static: Path | None = page.FOLDER,
) -> Application:
    """Return the application for a service.

    Args:
        hosts, origins: see `security.Guard`.
        static: folder of the page's files; None: no page is served.
    """
    metrics = metrics or Metrics()
    app = Application(title="acestep-jax", version=version, description=DESCRIPTION, redirect_slashes=False)
    polls = Polls(
        super(Application, app).__call__,
        service=service,
        songs=functools.partial(native.view, service, keys),
        tasks=authors.Authors(service, keys).task,
        jobs=cpp.state,
    )
    app.front = Guard(
        polls,
        keys=keys,
        hosts=hosts,
        origins=origins,
        max_bytes=service.limits.upload_bytes + 2**20,
        late_keys=authors.LATE_KEYS,
        polls=polls.quick,
    )
    _add_errors(app)
    metrics.watch(service)

    def report(report: BatchReport) -> None:
        if report.plans:
            metrics.plans.inc(len(report.works))
            return
        config = service.engine.models[report.works[0].model].configs["vae"]
        frames = sum(work.shape.frames for work in report.works)
        metrics.batch(report, frames * config.hop_length / config.sampling_rate)

    service.on_report = report

    @app.get("/health", tags=["server"], summary="Whether the server is alive")
    async def health(response: Response) -> dict[str, Any]:
        """Return the health in the formats of the authors' server and of acestep.cpp."""
        response.status_code = 500 if service.dead else 200
        model = next(iter(service.engine.models))
        about = dict(
            status="error" if service.dead else "ok",
            service="ACE-Step API",
            version="1.0",
            models_initialized=service.engine.ready,
            llm_initialized=service.planner_of() is not None,
            loaded_model=model,
            loaded_lm_model=service.planner_of(),
        )
        return envelope(about) | dict(status=about["status"])

    @app.get("/ready", tags=["server"], summary="Whether the server is ready to generate songs")
    async def ready(response: Response) -> dict[str, Any]:
        is_ready = service.engine.ready and not service.closing
        response.status_code = 500 if service.dead else 200 if is_ready else 503
        return dict(ready=is_ready)

    @app.get("/metrics", tags=["server"], summary="Figures for Prometheus")
    def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.post("/v1/session", tags=["server"], summary="Exchange the key for a cookie", status_code=204)
    async def session(request: Request) -> Response:
        given = await uploads.read_bytes(request, MAX_KEY)
        if not keys.accepts(given.decode("utf-8", "replace").strip()):
            raise HTTPException(401, "Invalid API key")
        response = Response(status_code=204)
        response.set_cookie(COOKIE, keys.session(), max_age=LINK_SECONDS, httponly=True, samesite="strict")
        return response

    app.include_router(native.router(service, keys))
    app.include_router(plans.router(service))
    app.include_router(authors.router(service, keys))
    app.include_router(chat.router(service, keys))
    app.include_router(cpp.router(service, version))
    app.include_router(page.router(service, static))
    return app


def _add_errors(app: FastAPI) -> None:
    """Add handlers that return errors in the format of the path's protocol."""

    @app.exception_handler(InputError)
    async def input_error(request: Request, error: InputError) -> Response:
        return answer(request, 400, str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return answer(request, 429, str(error), {"retry-after": str(error.retry_after)})

    @app.exception_handler(Closing)
    async def closing(request: Request, error: Closing) -> Response:
        return answer(request, 503, str(error), {"retry-after": str(RETRY_SECONDS)})

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer(request, 422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> Response:
        logger.error("%s: a file could not be read or written", request.scope["path"], exc_info=error)
        if error.errno in DISK_FULL:
            return answer(request, 507, "the disk is full")
        later = {"retry-after": str(RETRY_SECONDS)}
        return answer(request, 503, "a file cannot be read or written now; try again", later)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return answer(request, 500, "internal error; the server's log has the details")


def answer(request: Request, status: int, detail: str, headers: Any = None) -> Response:
    """Return an error in the format of the path's protocol."""
    return JSONResponse(error_body(request.scope["path"], status, detail), status, headers=headers)


class Server(uvicorn.Server):
    """uvicorn's server with our shutdown: SIGTERM lets songs in progress finish, a second signal exits at once."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self.service, self.grace = service, grace
        self._signals = 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + sig)  # nothing is lost: files are atomic, and unfinished songs are made after a restart
        name = signal.Signals(sig).name
        logger.info("%s: no new work; songs in progress get %g s, waiting songs are kept", name, self.grace)
        threading.Thread(target=self._end, name="end").start()

    def _end(self) -> None:
        self.service.close(self.grace)
        self.should_exit = True

    def end_dead(self) -> None:
        """Exit because the engine has died."""
        self.should_exit = True


def settings(app: Application, host: str, port: int, *, log_level: str, shutdown: int) -> uvicorn.Config:
    """Return uvicorn's configuration for the application, without needless work per request.

    Args:
        shutdown: seconds that connections get at shutdown.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(app.front.quick),
        log_level=log_level,
        access_log=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=shutdown,
        workers=1,
    )


def serve(app: Application, service: Service, host: str, port: int, *, grace: float, log_level: str = "warning") -> int:
    """Serve until a signal; return the exit status, 1 if the engine has died.

    Raises:
        InputError: if the address cannot be used.
    """
    config = settings(app, host, port, log_level=log_level, shutdown=5)
    server = Server(config, service, grace)
    service.on_death = server.end_dead
    try:
        sock = config.bind_socket()
    except SystemExit:
        raise InputError(f"--host, --port: {host}:{port} cannot be used; is another server running there?") from None
    service.start()
    sockets: Sequence[Any] = [sock]
    server.run(sockets=list(sockets))
    service.close(0)
    return 1 if service.dead else 0
