"""Fetches URLs that are on a list, and never reaches into a private network by accident."""

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore2
from starlette.exceptions import HTTPException

MOST_REDIRECTS = 5
PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": "emoshare", "Accept": "audio/*, */*;q=0.5", "Accept-Encoding": "identity"}


class NotAllowedError(ValueError):
    """No entry of the list allows this URL or address."""


@dataclass(frozen=True)
class Url:
    """
    Args:
        scheme (`str`): `"http"` or `"https"`.
        host (`str`): in lower case; IPv6 addresses without brackets.
        port (`int`).
        path (`str`): quoted; begins with `/`.
        query (`str`): quoted.
    """

    scheme: str
    host: str
    port: int
    path: str = "/"
    query: str = ""

    @classmethod
    def parse(cls, text):
        """Raises `NotAllowedError` if the text is not a URL, or programs may disagree on its meaning."""
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port or PORTS.get(parts.scheme)
        except ValueError as error:
            raise NotAllowedError(f"{text!r} is not a URL ({error})") from error
        if parts.scheme not in PORTS or not host or not host.isascii() or "@" in parts.netloc:
            raise NotAllowedError(f"{text!r} is not a URL that can be fetched; expected http(s)://HOST/PATH")
        steps = unquote(parts.path).replace("\\", "/").split("/")
        is_climbing = any(step.partition(";")[0] == ".." for step in steps)
        if is_climbing or any(character.isspace() or not character.isprintable() for character in text):
            raise NotAllowedError(f"{text!r} contains '..' or whitespace")
        path, query = (quote(part, safe="/?%:@!$&'()*+,;=~") for part in (parts.path or "/", parts.query))
        return cls(parts.scheme, host, port, path, query)

    @property
    def target(self):
        return f"{self.path}?{self.query}" if self.query else self.path


class AllowedUrls:
    """
    Args:
        entries: each is `HOST` or `HOST:PORT`, which allows all http and https URLs of that host, or
            `https://HOST/PATH`, which allows that URL and those below its path.
        max_bytes (`int`): largest file.
        max_seconds (`float`): longest time from the first request to the last byte.

    Raises:
        ValueError: if an entry is none of these.
    """

    def __init__(self, entries, max_bytes, max_seconds):
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self.beginnings = [beginning for entry in entries for beginning in _beginnings(entry)]
        self.backend = _CheckedAddresses({beginning.host for beginning in self.beginnings})

    def check(self, text):
        """Returns the `Url`; raises `NotAllowedError` if no entry allows it."""
        url = Url.parse(text)
        for beginning in self.beginnings:
            is_below = f"{url.path}/".startswith(f"{beginning.path.rstrip('/')}/")
            if is_below and (url.scheme, url.host, url.port) == (beginning.scheme, beginning.host, beginning.port):
                return url
        raise NotAllowedError(f"{text!r} is not among the URLs that this server may fetch")

    async def fetch(self, text, file):
        """
        Downloads a URL into a file object. Redirects are checked like the URL itself, and so is the IP address that
        it connects to.

        Raises:
            HTTPException: 403 if the URL is not allowed, 413 if the file is too large, 422 if it cannot be fetched.
        """
        try:
            async with (
                asyncio.timeout(self.max_seconds),
                httpcore2.AsyncConnectionPool(network_backend=self.backend) as pool,
            ):
                await self._follow(pool, text, file)
        except NotAllowedError as error:
            raise HTTPException(403, str(error)) from error
        except TimeoutError:
            raise HTTPException(422, f"{text}: took more than {self.max_seconds:g} s to fetch") from None
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            raise HTTPException(422, f"{text}: cannot be fetched ({error or type(error).__name__})") from error

    async def _follow(self, pool, text, file):
        for _ in range(MOST_REDIRECTS + 1):
            url = self.check(text)
            address = httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
            async with pool.stream("GET", address, headers=HEADERS) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                    text = _joined(text, headers[b"location"].decode("latin-1"))
                    continue
                if response.status != 200:
                    raise OSError(f"HTTP status {response.status}")
                await self._save(response, text, file)
                return
        raise OSError(f"more than {MOST_REDIRECTS} redirects")

    async def _save(self, response, text, file):
        async for chunk in response.aiter_stream():
            file.write(chunk)
            if file.tell() > self.max_bytes:
                raise HTTPException(413, f"{text}: has more than {self.max_bytes:,} bytes")


def _joined(text, location):
    try:
        return urljoin(text, location)
    except ValueError as error:
        raise NotAllowedError(f"{text} redirects to {location!r}, which is not a URL ({error})") from error


def _beginnings(entry):
    try:
        if "://" in entry:
            return [Url.parse(entry)]
        http, https = (Url.parse(f"{scheme}://{entry}") for scheme in PORTS)
    except NotAllowedError as error:
        raise ValueError(f"--allow_url: {error}") from error
    if "/" in entry or "?" in entry:
        raise ValueError(f"--allow_url: got {entry!r}; expected HOST, HOST:PORT or https://HOST/PATH")
    return [http, https]


class _CheckedAddresses(httpcore2.AnyIOBackend):
    """
    Connects to public addresses only, and to private ones that are on the list as addresses, because a host name may
    resolve to any address.

    Args:
        named: the hosts on the list, which may be addresses.
    """

    def __init__(self, named):
        self.named = named

    async def connect_tcp(self, host, port, **options):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(place[0] for *_, place in found))
        for address in addresses:
            if not ip_address(address).is_global and address not in self.named:
                raise NotAllowedError(f"{host} is at {address}, a private address that is not on the list")
        for address in addresses[:-1]:
            with suppress(httpcore2.ConnectError):
                return await super().connect_tcp(address, port, **options)
        return await super().connect_tcp(addresses[-1], port, **options)
