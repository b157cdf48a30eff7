"""Limits on uploads, and reading audio files from requests."""

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from tempfile import SpooledTemporaryFile

from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException

IN_MEMORY = 1 << 20  # bytes; larger uploads go into a temporary file
MOST_JSON = 1 << 16  # bytes
LINGER_S = 2  # how long the rest of an upload is received and discarded after its answer has been sent


class UploadLimits:
    """
    ASGI middleware that answers bodies that are too large with 413, and those that are too slow with 408.

    If a request is answered before its body has ended, the server receives the body a little longer. If it closed the
    connection at once, a client that is still sending would lose the answer.

    Args:
        app: ASGI application.
        max_bytes (`int`): largest body.
        max_seconds (`float`): longest time from a request's headers to the end of its body.
    """

    def __init__(self, app, max_bytes, max_seconds):
        self.app = app
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            upload = _Upload(self, scope, receive, send)
            await self.app(scope, upload.receive, upload.send)
        else:
            await self.app(scope, receive, send)


class _Upload:
    """A request whose body is being received, and its answer."""

    def __init__(self, limits, scope, receive, send):
        self.limits = limits
        self.received, self.sent = receive, send
        self.deadline = asyncio.get_running_loop().time() + limits.max_seconds
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self.promised, self.num_bytes = int(length) if length.isdigit() else 0, 0
        self.is_complete = self.promised == 0 and "transfer-encoding" not in headers

    async def receive(self):
        if self.is_complete:  # the next message is the end of the connection, which may take any time
            return await self.received()
        self.check_size(self.promised)
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.received()
        except TimeoutError:
            raise HTTPException(408, f"the upload took more than {self.limits.max_seconds:g} s") from None
        self.num_bytes += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        self.check_size(self.num_bytes)
        return message

    def check_size(self, num_bytes):
        if num_bytes > self.limits.max_bytes:
            raise HTTPException(413, f"the upload has more than {self.limits.max_bytes:,} bytes")

    async def send(self, message):
        is_early = not self.is_complete
        if is_early and message["type"] == "http.response.start":
            MutableHeaders(raw=message["headers"])["connection"] = "close"
        elif is_early and not message.get("more_body", False):
            await self.sent({**message, "more_body": True})  # the client has the whole answer now
            await self.linger()
            message = {"type": "http.response.body"}
        await self.sent(message)

    async def linger(self):
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await self.received()).get("more_body", False):
                    pass


class NamedFile:
    """A binary file with a name for messages, because the names of temporary files mean nothing."""

    def __init__(self, file, name):
        self.file, self.name = file, name

    def __getattr__(self, name):
        return getattr(self.file, name)


@asynccontextmanager
async def audio_of(request, allowed):
    """
    The audio of a request: its body, the only file of a form, or the file at the URL in `{"url": ...}`.

    Args:
        request: Starlette's `Request`.
        allowed: `AllowedUrls`.

    Yields:
        `NamedFile`, until the block ends.

    Raises:
        HTTPException: if the body is none of these, and as `AllowedUrls.fetch` does.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        async with request.form(max_files=1) as form:
            parts = [part for _, part in form.multi_items()]
            if len(parts) != 1 or not isinstance(parts[0], UploadFile):
                raise HTTPException(400, "expected a form with a file and nothing else; options are query parameters")
            yield NamedFile(parts[0].file, "audio")
        return
    with SpooledTemporaryFile(IN_MEMORY) as file:
        if content_type == "application/json":
            name = await _url_of(request)
            await allowed.fetch(name, file)
        else:
            name = "audio"
            async for chunk in request.stream():
                file.write(chunk)
        file.seek(0)
        yield NamedFile(file, name)


async def _url_of(request):
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_JSON:
            raise HTTPException(413, f"the JSON has more than {MOST_JSON:,} bytes")
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise HTTPException(400, f"the body is not valid JSON ({error})") from error
    if not isinstance(given, dict) or list(given) != ["url"] or not isinstance(given["url"], str):
        raise HTTPException(422, 'the JSON has no URL; expected {"url": "https://..."}, and nothing else')
    return given["url"]
