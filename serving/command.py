"""Runs the server of `emoshare serve`."""

import os
import signal
import socket
import sys

import uvicorn

from .application import Metrics, application
from .batches import Batches, note_warnings
from .urls import AllowedUrls

# oneDNN caches code for the last 1,024 shapes that it has seen, but batches hardly ever have the same shape twice. The
# cache would increase memory by a third over thousands of requests, for no gain. oneDNN reads this variable when it
# first computes something.
KEPT_PRIMITIVES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def _open_port(host, port):
    """
    Binds the port before the model is loaded. Clients cannot connect until the server listens on it.

    Returns:
        `socket.socket`.

    Raises:
        ValueError: if the port cannot be bound.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        own = socket.socket(family)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from error
    return own


def serve(arguments, load):
    """
    Serves until a signal arrives, and then finishes the requests that it has accepted.

    Args:
        arguments: parsed arguments of `emoshare serve`.
        load: function that returns the `EmotionSharePipeline`.

    Returns:
        0, after SIGTERM.

    Raises:
        ValueError: if the port cannot be bound, or an entry of `allow_url` is not valid.
        KeyboardInterrupt: after Ctrl-C.
    """
    os.environ.setdefault(*KEPT_PRIMITIVES)
    max_bytes = arguments.max_megabytes << 20
    allowed = AllowedUrls(arguments.allow_url, max_bytes, arguments.upload_seconds)
    own = _open_port(arguments.host, arguments.port)
    metrics = Metrics()
    batches = Batches(
        load(), arguments.batch_size, arguments.max_seconds, arguments.max_waiting, metrics.batches.observe
    )
    note_warnings()
    app = application(batches, allowed, metrics, max_bytes, arguments.upload_seconds)
    server = _Server(
        arguments.model,
        uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False),
    )
    # uvicorn handles signals itself until it has stopped, and then raises the signal again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.run(sockets=[own])
    return 0


class _Server(uvicorn.Server):
    """Prints its address as soon as it answers requests."""

    def __init__(self, name, config):
        super().__init__(config)
        self.name = name

    async def startup(self, sockets=None):
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"{self.name} is served at http://{host}:{port}/predict", flush=True)
