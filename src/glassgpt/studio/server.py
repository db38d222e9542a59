"""The explorer's server: URLs become questions, answers become JSON and bytes.

    glassgpt explore runs/book

Nothing is computed here. FastAPI is imported when a server is built: it belongs to the extra
`serve`.
"""

from __future__ import annotations

import inspect
import json
import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from glassgpt.errors import UserError
from glassgpt.studio.explorer import Explorer, NotHeldError
from glassgpt.studio.held_trace import MissingError
from glassgpt.studio.shown_trace import ShownTrace

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def build_app(explorer: Explorer, hosts: list[str]) -> FastAPI:
    """The ASGI application. It answers only requests whose Host header is one of `hosts`:
    otherwise a web site could point a name of its own at this machine and read the answers."""
    from fastapi import FastAPI
    from fastapi.staticfiles import StaticFiles
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.middleware("http")
    async def headers(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    def unknown(rest: str) -> None:
        raise MissingError(f"there is no /api/{rest}")

    _handle_errors(app)
    _add_routes(app, explorer)
    app.add_api_route("/api/{rest:path}", unknown, methods=["GET", "POST"], response_model=None)
    app.mount("/", StaticFiles(directory=STATIC, html=True, check_dir=False))
    return app


def _handle_errors(app: FastAPI) -> None:
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(UserError)
    def refused(request: Request, error: UserError) -> Response:
        status = {NotHeldError: 410, MissingError: 404}.get(type(error), 400)
        return _json({"error": " ".join(str(error).split())}, status)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return _json({"error": f"{where}: {first['msg']}"}, 400)

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> Response:
        return _json({"error": f"{request.url.path}: {error.detail}"}, error.status_code)


def _add_routes(app: FastAPI, explorer: Explorer) -> None:
    """Each URL with the method that answers it; the method's arguments are read from the URL, and
    a request from the body."""
    from fastapi import Query

    lock = Lock()  # an Explorer answers one question at a time

    def add(path: str, question: Callable[..., object], method: str = "GET") -> None:
        parameters = [*inspect.signature(question, eval_str=True).parameters.values()]
        of_trace = "{key}" in path  # a method of ShownTrace: the URL names it instead of `self`
        if of_trace:
            parameters[0] = parameters[0].replace(name="key", annotation=str)

        def answer(**arguments: object) -> Response:
            with lock:
                held = [explorer.held(str(arguments.pop("key")))] if of_trace else []
                found = question(*held, **arguments)
            return _bytes(found) if isinstance(found, np.ndarray) else _json(found)

        answer.__signature__ = inspect.Signature(parameters)
        app.add_api_route(path, answer, methods=[method], response_model=None)

    first, end = Query(None, alias="from"), Query(None, alias="to")

    def lens(held: ShownTrace, first: int | None = first, end: int | None = end, k: int = 5):
        return held.lens(first, end, k)

    add("/api/model", explorer.model)
    add("/api/training", explorer.training)
    add("/api/token/{token}", explorer.token)
    add("/api/trace", explorer.trace, "POST")
    add("/api/compare", explorer.compare)
    add("/api/sample", explorer.sample, "POST")
    add("/api/patch_map", explorer.patch_map, "POST")
    add("/api/trace/{key}/maps", ShownTrace.small_maps)
    add("/api/trace/{key}/tensor/{name}", ShownTrace.window)
    add("/api/trace/{key}/cell/{name}", ShownTrace.cell)
    add("/api/trace/{key}/lens", lens)
    add("/api/trace/{key}/attribution", ShownTrace.attribution)
    add("/api/trace/{key}/loss", ShownTrace.loss)
    add("/api/trace/{key}/distribution", ShownTrace.distribution, "POST")


def _json(value: object, status: int = 200) -> Response:
    from fastapi.responses import Response

    content = to_json(value).encode("utf-8", "replace")
    return Response(content, status, media_type="application/json")


def to_json(value: object) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    """What JSON can hold: dataclasses become objects (a field `from_` is called "from"), infinity
    and NaN become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value):
        return {f.name.rstrip("_"): _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _bytes(array: np.ndarray) -> Response:
    from fastapi.responses import Response

    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    shape = {"X-Shape": ",".join(map(str, array.shape))}
    return Response(little.tobytes(), headers=shape, media_type="application/octet-stream")


# -- serving -------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket on which nobody else listens; raises `UserError` for a port in use."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"glassgpt explore needs {error.name}; install it: pip install 'glassgpt[serve]'"
        ) from error
    if not 0 <= port <= 65535:
        raise UserError(f"port={port} must be 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # at once: if two servers start together, the second must fail here
        return listener
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with "
            f"--port {min(port + 1, 65535)}"
        ) from error


def serve(explorer: Explorer, listener: socket.socket, host: str) -> None:
    """Answer until Ctrl-C."""
    import uvicorn

    here = ["127.0.0.1", "localhost", "[::1]", host]
    app = build_app(explorer, ["*"] if host in ("0.0.0.0", "::", "") else here)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])
