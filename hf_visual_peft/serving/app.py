"""The HTTP side of a server."""

from __future__ import annotations

import asyncio
import hmac
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from ..version import __version__
from .errors import RequestError
from .options import ServeOptions
from .service import Service


OPTIONS_VARIABLE = "HF_VISUAL_PEFT_SERVE"  # how a worker process learns its options
PAGE = Path(__file__).with_name("page.html")
LONGEST_NAME = 200
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "string", "format": "binary"}},
                    "required": ["image"],
                }
            },
        },
    }
}
DESCRIPTION = "One backbone, and the adapter of each request by its name. Every error says why, as `error.message`."


def from_environment() -> FastAPI:
    """The application of a worker process."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    return create_app(Service(ServeOptions.from_json(os.environ[OPTIONS_VARIABLE])))


def _follow_parent() -> None:
    """End this worker if the process that started it is gone, as after kill -9."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def create_app(service: Service) -> FastAPI:
    """The application.

    Args:
        service: which does the work; it starts and stops with the application.
    """
    options, metrics = service.options, service.metrics
    token = options.token()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="hf-visual-peft serve", version=__version__, description=DESCRIPTION, lifespan=lifespan)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        wanted = f"Bearer {token}"
        if token and not hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode()):
            raise RequestError(
                401, "no_token", "Send the header 'Authorization: Bearer TOKEN'.", {"WWW-Authenticate": "Bearer"}
            )

    own: dict[str, Any] = {"dependencies": [Depends(check_token)]}

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Any]) -> Response:
        before = time.perf_counter()
        response: Response = await call_next(request)
        metrics.requests.labels(str(response.status_code)).inc()
        if request.url.path == "/v1/predict":
            metrics.latency.observe(time.perf_counter() - before)
        return response

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/health", summary="Whether the server works; 503 while it shuts down")
    async def health() -> dict[str, Any]:
        if service.closing or service.work.done():
            raise RequestError(503, "closing", "The server is shutting down.")
        return {"status": "ok", "model": options.model, "adapters": len(service.entries)}

    @app.get("/metrics", summary="Counts for Prometheus", response_class=Response, **own)
    async def counts() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/adapters", summary="All adapters, with their classes", **own)
    async def adapters() -> dict[str, Any]:
        return {"model": options.model, "adapters": service.adapters()}

    @app.post("/v1/predict", summary="Classify an image with one or more adapters", openapi_extra=BODY, **own)
    async def predict(
        request: Request,
        adapter: Annotated[list[str], Query(description="name; give it again for more adapters")] = [],  # noqa: B006
        top_k: Annotated[int, Query(ge=1, le=10_000, description="classes to tell")] = 5,
    ) -> dict[str, Any]:
        entries = service.find(adapter)
        service.admit(len(entries))
        try:
            content = await _in_time(_image(request, options.max_bytes), options.timeout, 408, "slow_body", "arrived")
            found = await _in_time(
                service.predict(entries, content, top_k), options.timeout, 504, "timeout", "was predicted"
            )
        finally:
            service.leave(len(entries))
        return {"model": options.model, "results": found}

    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Make every error say why, in one form."""

    def answer(status: int, code: str, message: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": {"code": code, "message": message}}, status, headers)

    @app.exception_handler(RequestError)
    async def of_request(request: Request, error: RequestError) -> JSONResponse:
        return answer(error.status, error.code, error.message, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_values(request: Request, error: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return answer(422, "invalid_value", told[:1000])

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, "http", f"{request.method} {request.url.path}: {error.detail}", error.headers)

    @app.exception_handler(Exception)
    async def of_server(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "internal", f"The server failed ({type(error).__name__}); its log says where.")

    @app.exception_handler(ClientDisconnect)
    async def of_client(request: Request, error: ClientDisconnect) -> JSONResponse:
        return answer(400, "disconnected", "The client went away before the request was complete.")


async def _in_time(work: Any, seconds: float, status: int, code: str, done: str) -> Any:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise RequestError(status, code, f"Within {seconds:g} seconds no image {done}.") from None


async def _image(request: Request, most: int) -> bytes:
    """The encoded image: the body, or the field `image` of a form.

    Raises:
        RequestError: it is too large, or there is none.
    """
    too_large = RequestError(413, "too_many_bytes", f"The body has more than {most:,} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _field(request, bytes(body))
    if kind in ("application/json", "application/x-www-form-urlencoded") or kind.startswith("text/"):
        raise RequestError(
            415,
            "wrong_content_type",
            f"Content-Type {kind}: send the file of an image as the body (image/jpeg and so on), or as the field "
            "'image' of multipart/form-data.",
        )
    return bytes(body)


async def _field(request: Request, body: bytes) -> bytes:
    async def parts() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, parts(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError, LookupError) as error:
        told = getattr(error, "message", "") or error
        raise RequestError(400, "malformed_form", f"The form cannot be read: {told}") from None
    found = form.get("image")
    if not isinstance(found, UploadFile):
        raise RequestError(400, "no_image", "The form has no file in a field 'image'.")
    return await found.read()
