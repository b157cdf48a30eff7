"""Which URLs a server fetches, from a server on this machine."""

import asyncio
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from starlette.exceptions import HTTPException

from emoshare.serving.urls import AllowedUrls, NotAllowedError

CLIP = b"a clip" * 100


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", unquote(self.path.removeprefix("/to?")))
            self.end_headers()
        elif self.path == "/clips/slow":
            self.send_response(200)
            self.end_headers()
            while not self.server.is_over.wait(0.05):
                self.wfile.write(b".")
        elif self.path.startswith("/clips/") or self.path == "/secret":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CLIP)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def files():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.seen, server.is_over = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.is_over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(url, *entries, max_bytes=1000, max_seconds=5):
    file = io.BytesIO()
    asyncio.run(AllowedUrls(entries, max_bytes, max_seconds).fetch(url, file))
    return file.getvalue()


ENTRIES = ["media.example.org", "10.0.0.5:9000", "https://example.com/clips", "http://[::1]:81/"]


@pytest.mark.parametrize(
    "url",
    [
        "https://media.example.org/a/b.wav?key=1#part",
        "HTTP://Media.Example.org:80/",
        "http://10.0.0.5:9000/x",
        "https://example.com/clips",
        "https://example.com/clips/Müller 1.wav".replace(" ", "%20"),
        "http://[::1]:81/x",
    ],
)
def test_urls_of_the_list_are_admitted(url):
    AllowedUrls(ENTRIES, 1, 1).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://media.example.org:8443/a.wav",
        "https://media.example.org.evil.net/a.wav",
        "https://evil.net/https://media.example.org/a.wav",
        "https://media.example.org@evil.net/a.wav",
        "https://evil.net\\@media.example.org/a.wav",
        "https://me:secret@media.example.org/a.wav",
        "https://a.media.example.org/a.wav",
        "https://media.example.org./a.wav",
        "http://10.0.0.5/x",
        "http://167772165:9000/x",
        "http://example.com/clips/a.wav",
        "https://example.com/",
        "https://example.com/clips-of-others/a.wav",
        "https://example.com/clips/../secret",
        "https://example.com/clips/%2e%2E/secret",
        "https://example.com/clips/..;/secret",
        "https://example.com/clips/..%5Csecret",
        "https://example.com/clips/a\r\nHost: evil.net",
        "https://media.example.org:x/",
        "https://[::1/",
        "file:///etc/passwd",
        "ftp://media.example.org/a.wav",
        "/etc/passwd",
        "https://",
        "",
    ],
)
def test_all_others_are_not(url):
    with pytest.raises(NotAllowedError):
        AllowedUrls(ENTRIES, 1, 1).check(url)
    with pytest.raises(NotAllowedError):
        AllowedUrls([], 1, 1).check(url)


@pytest.mark.parametrize("entry", ["", "media.example.org/clips", "https://", "ftp://media.example.org", "a b"])
def test_entries_that_say_nothing_are_refused(entry):
    with pytest.raises(ValueError, match="--allow_url: "):
        AllowedUrls([entry], 1, 1)


def test_a_file_is_fetched_and_redirects_within_the_list_are_followed(files):
    assert fetch(f"{files.url}/clips/a.wav", f"{files.url}/clips") == CLIP
    host = f"127.0.0.1:{files.server_port}"
    assert fetch(f"{files.url}/to?/clips/a.wav", host) == CLIP
    assert fetch(f"{files.url}/to?{files.url}/clips/a.wav", host) == CLIP


def test_redirects_out_of_the_list_are_not_followed(files):
    for target in ("/secret", f"{files.url}/clips/../secret", "http://169.254.169.254/latest/meta-data"):
        with pytest.raises(HTTPException) as refused:
            fetch(f"{files.url}/to?{target}", f"{files.url}/clips", f"{files.url}/to")
        assert refused.value.status_code == 403
    assert "/secret" not in files.seen


def test_a_redirect_to_what_is_no_url_is_said(files):
    with pytest.raises(HTTPException, match=r" redirects to 'http://\[bad', which is not a URL") as refused:
        fetch(f"{files.url}/to?http://[bad", f"127.0.0.1:{files.server_port}")
    assert refused.value.status_code == 403


def test_a_name_that_leads_to_a_private_address_is_not_followed_unless_the_list_has_the_address(files):
    url = f"http://localhost:{files.server_port}/clips/a.wav"
    entry = f"localhost:{files.server_port}"
    with pytest.raises(HTTPException) as refused:
        fetch(url, entry)
    assert refused.value.status_code == 403
    assert "a private address" in refused.value.detail
    assert files.seen == []
    assert fetch(url, entry, "127.0.0.1", "[::1]") == CLIP


@pytest.mark.parametrize(
    ("path", "limits", "status", "message"),
    [
        ("/clips/a.wav", {"max_bytes": 99}, 413, "has more than 99 bytes"),
        ("/clips/slow", {"max_seconds": 0.3}, 422, "took more than 0.3 s"),
        ("/missing", {}, 422, "HTTP status 404"),
        ("/to?/to?/to?/to?/to?/to?/to?/clips/a", {}, 422, "more than 5 redirects"),
    ],
)
def test_what_cannot_be_fetched_is_said(path, limits, status, message, files):
    began = time.monotonic()
    with pytest.raises(HTTPException) as failed:
        fetch(files.url + path, f"127.0.0.1:{files.server_port}", **limits)
    assert failed.value.status_code == status
    assert failed.value.detail.startswith(files.url + path)
    assert message in failed.value.detail
    assert time.monotonic() - began < 4


def test_a_server_that_does_not_answer_is_said(files):
    files.server_close()
    with pytest.raises(HTTPException, match="cannot be fetched"):
        fetch(f"{files.url}/clips/a.wav", f"127.0.0.1:{files.server_port}")
