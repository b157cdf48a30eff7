"""The HTTP application: its paths, options, answers and metrics."""

import asyncio
import time
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .batches import ModelError, NoRoomError, TooLongError
from .uploads import UploadLimits, audio_of

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # upper bounds of the histogram's buckets
WINDOWS = (1, 2, 4, 8, 16, 32, 64)
RETRY_AFTER_S = 1
GONE = 499  # nginx's status for clients that disconnect before their answer

DESCRIPTION = """
The body is an audio file, a form with one file, or JSON: `{"url": "https://..."}`, on a host that this server may
fetch from. Options of the pipeline are query parameters. The answer is what the pipeline returns. If something may be
wrong with the audio, the `Warning` header says what.
"""
BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
        },
        "application/json": {"schema": {"type": "object", "properties": {"url": {"type": "string"}}}},
    },
}
ERRORS = {
    400: "the form or the JSON is not valid",
    403: "a URL that this server may not fetch",
    408: "the upload was too slow",
    413: "the upload is too large, the clip is too long, or its overlapping windows are too long in total",
    422: "an option is not valid, or the audio cannot be used",
    500: "the model failed",
    503: "the queue is full; `Retry-After` says in how many seconds to try again",
}


class Options(BaseModel):
    """The options of the pipeline whose results can be JSON. The pipeline also checks their values."""

    model_config = ConfigDict(extra="forbid")

    top_k: int | None = Field(None, description="return only the `top_k` highest shares")
    chunk_length_s: float | None = Field(None, allow_inf_nan=False, description="longest window in seconds")
    stride_length_s: float | None = Field(
        None, allow_inf_nan=False, description="seconds at either end of a window that are context only"
    )
    hop_length_s: float | None = Field(
        None,
        allow_inf_nan=False,
        description="seconds of each window that count; audio before them is context",
    )
    return_timeline: bool | None = Field(None, description="also return the shares of each window")
    return_attention: bool | None = Field(None, description="also return the attention of each emotion's head")
    return_interval: bool | None = Field(None, description="also return a 90 % interval of each share")
    listeners: int | None = Field(None, description="number of listeners in the panel that the intervals are for")
    strict: bool = Field(True, description="refuse files that are truncated or damaged")


class Error(BaseModel):
    detail: str


class Metrics:
    """The metrics at `/metrics`, and ASGI middleware that counts and times the requests to `/predict`."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter("emoshare_requests", "Answers by HTTP status", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "emoshare_request_seconds", "From headers to answer", buckets=SECONDS, registry=self.registry
        )
        self.batches = Histogram("emoshare_batch_windows", "Windows per batch", buckets=WINDOWS, registry=self.registry)
        self.waiting = Gauge("emoshare_waiting_clips", "Clips waiting for their answer", registry=self.registry)
        ProcessCollector(registry=self.registry)

    def measuring(self, app):
        async def measured(scope, receive, send):
            if scope["type"] != "http" or scope["path"] != "/predict":
                return await app(scope, receive, send)
            began, statuses = time.perf_counter(), []

            def count(status):
                statuses.append(status)
                self.requests.labels(status).inc()
                self.seconds.observe(time.perf_counter() - began)

            async def count_and_send(message):
                if message["type"] == "http.response.start":
                    count(message["status"])
                await send(message)

            try:
                await app(scope, receive, count_and_send)
            except Exception:  # answered by an outer middleware
                if not statuses:
                    count(500)
                raise

        return measured


def application(batches, allowed, metrics, max_bytes, upload_seconds):
    """
    Args:
        batches: `Batches`; closed when the application shuts down.
        allowed: `AllowedUrls`.
        metrics: `Metrics`.
        max_bytes, upload_seconds: as in `UploadLimits`.

    Returns:
        `FastAPI`.
    """
    metrics.waiting.set_function(lambda: len(batches.unanswered))

    @asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(batches.close)

    app = FastAPI(title="EmoShare", lifespan=lifespan, exception_handlers=HANDLERS, redoc_url=None)
    app.add_middleware(UploadLimits, max_bytes=max_bytes, max_seconds=upload_seconds)
    app.add_middleware(metrics.measuring)

    @app.post(
        "/predict",
        summary="Shares of listeners who would perceive each emotion",
        description=DESCRIPTION,
        openapi_extra={"requestBody": BODY},
        response_class=JSONResponse,
        responses={status: {"model": Error, "description": text} for status, text in ERRORS.items()},
    )
    async def predict(request: Request, options: Annotated[Options, Query()]):
        options = options.model_dump(exclude_none=True)
        with _refusing():
            batches.parameters(**options)
        batches.check_room()
        async with audio_of(request, allowed) as audio:
            clip = batches.submit(audio, **options)
            with _refusing():
                windows = await _answer(request, clip)
        headers = {"Warning": f'199 emoshare "{_ascii("; ".join(clip.warnings))}"'} if clip.warnings else None
        return JSONResponse(batches.emotion_share.postprocess(windows, **clip.postprocess), headers=headers)

    @app.get("/health", summary="Whether the model is running", responses={503: {"model": Error}})
    async def health():
        if not batches.model.is_alive():
            raise HTTPException(503, "the model's thread has ended")
        return {"status": "ok"}

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def show_metrics():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


@contextmanager
def _refusing():
    """Turns errors in options and audio into HTTP errors."""
    try:
        yield
    except TooLongError as error:
        raise HTTPException(413, str(error)) from error
    except (ValueError, OSError) as error:
        raise HTTPException(422, str(error)) from error


async def _answer(request, clip):
    """The outputs of a clip's windows. If the client disconnects first, windows not yet computed are skipped."""
    windows, gone = asyncio.wrap_future(clip.windows), asyncio.create_task(request.receive())
    try:
        await asyncio.wait([windows, gone], return_when=asyncio.FIRST_COMPLETED)
        if not windows.done():
            raise ClientDisconnect
        return windows.result()
    finally:
        windows.cancel()
        gone.cancel()
        if not clip.decoding.cancel():  # do not close the file while it is read
            await asyncio.gather(asyncio.wrap_future(clip.decoding), return_exceptions=True)


def _ascii(text):
    return text.encode("ascii", "backslashreplace").decode().replace('"', "'")


def _answering(status, **headers):
    """An exception handler that answers with this status and the exception's message."""

    async def handle(request, error):
        return JSONResponse({"detail": str(error)}, status, headers)

    return handle


async def _refuse_options(request, error):
    problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()]
    return JSONResponse({"detail": "; ".join(problems)}, 422)


HANDLERS = {
    RequestValidationError: _refuse_options,
    NoRoomError: _answering(503, **{"Retry-After": str(RETRY_AFTER_S)}),
    ModelError: _answering(500),
    ClientDisconnect: _answering(GONE),
}
