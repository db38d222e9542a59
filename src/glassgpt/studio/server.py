"""The explorer's server: URLs to questions, answers to JSON and bytes. Nothing is computed here.

    glassgpt explore runs/book

FastAPI is imported when a server is built: it belongs to the extra `serve`.
"""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.errors import UserError
from glassgpt.studio.held_trace import MissingError
from glassgpt.studio.requests import (
    DistributionRequest,
    PatchMapRequest,
    SampleRequest,
    TraceRequest,
)
from glassgpt.studio.session import NotHeldError, Session

STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
                               "style-src 'self' 'unsafe-inline'; base-uri 'none'; "
                               "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}  # fmt: skip


def build_app(session: Session, hosts: list[str]) -> Any:
    """The ASGI application. It answers for `hosts` only: another name that a web site had pointed
    here would let that site read the answers."""
    from fastapi import FastAPI
    from fastapi.responses import Response
    from fastapi.staticfiles import StaticFiles
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.middleware("http")
    async def headers(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    def answer(value: Any, status: int = 200) -> Response:
        text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
        return Response(text.encode("utf-8", "replace"), status, media_type="application/json")

    _errors(app, answer)
    _routes(app, session, answer)
    _trace_routes(app, session, answer)

    @app.api_route("/api/{rest:path}", methods=["GET", "POST"], response_model=None)
    def nothing(rest: str):
        raise MissingError(f"there is no /api/{rest}")

    app.mount("/", StaticFiles(directory=STATIC, html=True, check_dir=False))
    return app


def _errors(app: Any, answer: Any) -> None:
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    @app.exception_handler(UserError)
    def refused(request: Any, error: UserError) -> Any:
        status = (
            410
            if isinstance(error, NotHeldError)
            else 404
            if isinstance(error, MissingError)
            else 400
        )
        return answer({"error": " ".join(str(error).split())}, status)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Any, error: Any) -> Any:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return answer({"error": f"{where}: {first['msg']}"}, 400)

    @app.exception_handler(HTTPException)
    def other(request: Any, error: Any) -> Any:
        return answer({"error": f"{request.url.path}: {error.detail}"}, error.status_code)


def _routes(app: Any, session: Session, answer: Any) -> None:
    @app.get("/api/model", response_model=None)
    def model():
        return answer(session.model())

    @app.post("/api/trace", response_model=None)
    def trace(asked: TraceRequest):
        return answer(session.trace(asked))

    @app.post("/api/sample", response_model=None)
    def sample(asked: SampleRequest):
        return answer(session.sample(asked))

    @app.get("/api/compare", response_model=None)
    def compare(a: str, b: str):
        return answer(session.compare(a, b))

    @app.post("/api/patch_map", response_model=None)
    def patch_map(asked: PatchMapRequest):
        return _bytes(session.patch_map(asked))

    @app.get("/api/token/{token}", response_model=None)
    def token(token: int, model: str = "a"):
        return answer(session.token(token, model))

    @app.get("/api/training", response_model=None)
    def training():
        return answer(session.training())


def _trace_routes(app: Any, session: Session, answer: Any) -> None:
    from fastapi import Query

    @app.get("/api/trace/{key}/maps", response_model=None)
    def maps(key: str):
        return _bytes(session.maps(key))

    @app.get("/api/trace/{key}/tensor/{name}", response_model=None)
    def tensor(key: str, name: str, head: int | None = None, rows: str = "", columns: str = ""):
        return _bytes(session.tensor(key, name, head, rows, columns))

    @app.get("/api/trace/{key}/cell/{name}", response_model=None)
    def cell(key: str, name: str, index: str):
        return answer(session.cell(key, name, _integers(index)))

    first, end = Query(None, alias="from"), Query(None, alias="to")

    @app.get("/api/trace/{key}/lens", response_model=None)
    def lens(key: str, first: int | None = first, end: int | None = end, k: int = 5):
        return answer(session.lens(key, first, end, k))

    @app.get("/api/trace/{key}/attribution", response_model=None)
    def attribution(
        key: str, position: int = -1, token: int | None = None, against: int | None = None
    ):
        return answer(session.attribution(key, position, token, against))

    @app.get("/api/trace/{key}/loss", response_model=None)
    def loss(key: str):
        return answer(session.loss(key))

    @app.post("/api/trace/{key}/distribution", response_model=None)
    def distribution(key: str, asked: DistributionRequest):
        return answer(session.distribution(key, asked))


def _integers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"index={text!r}: write numbers, as in index=0,3,5") from None


def _bytes(array: np.ndarray) -> Any:
    from fastapi.responses import Response

    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    shape = ",".join(map(str, array.shape))
    return Response(little.tobytes(), media_type="application/octet-stream",
                    headers={"X-Shape": shape})  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


# -- serving -------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket on which nobody else listens; raises `UserError` for a port in use."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"glassgpt explore needs {error.name}; install it: "
                        "pip install 'glassgpt[serve]'") from error  # fmt: skip
    if not 0 <= port <= 65535:
        raise UserError(f"port={port} must be 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # now: of two servers that start together, one must lose
        return listener
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose "
                        f"another with --port {min(port + 1, 65535)}") from error  # fmt: skip


def serve(session: Session, listener: socket.socket, host: str) -> None:
    """Answer until Ctrl-C."""
    import uvicorn

    here = ["127.0.0.1", "localhost", "[::1]", host]
    hosts = ["*"] if host in ("0.0.0.0", "::", "") else here
    config = uvicorn.Config(build_app(session, hosts), log_level="warning", lifespan="off",
                            timeout_graceful_shutdown=1)  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
