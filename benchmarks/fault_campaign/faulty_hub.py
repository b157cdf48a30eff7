"""
The tests' Hub on loopback, in a process of its own, which can be told to fail at any request.

    python benchmarks/fault_campaign/faulty_hub.py

prints its address and runs until its standard input ends. `HubClient` controls it.
"""

import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from loopback_hub import TOKEN, Handler, LoopbackHub, Repository

DELAY_S = 0.3
CONTROL = "/_control"
STATUSES = {"429": 429, "500": 500, "503": 503}


class FaultyHub(LoopbackHub):
    """
    Attributes:
        fault: what happens at request number `at`, counted from the last `arm`, and at all later requests if `lasts`:
            `"cut"`: the Hub closes the connection without processing the request; `"lost"`: it processes the request
            and closes the connection without an answer; `"half"`: it processes the request and sends half of the
            answer; `"delay"`: it answers after `DELAY_S`; `"429"`, `"500"`, `"503"`: it refuses with this status.
    """

    handler = property(lambda self: FaultyHandler)
    fault, at, lasts, count = None, 0, False, 0
    saved = ({}, {})

    def control(self, command, fault=None, at=0, lasts=False):
        """`arm` sets a fault, `save` and `restore` repositories, `clear` removes them. Returns the Hub's state."""
        if command == "arm":
            self.fault, self.at, self.lasts, self.count = fault, at, lasts, 0
        elif command == "clear":
            self.repositories, self.blobs = {}, {}
        elif command == "save":
            self.saved = (_copies(self.repositories), dict(self.blobs))
        elif command == "restore":
            self.repositories, self.blobs = _copies(self.saved[0]), dict(self.saved[1])
        return {
            "count": self.count,
            "repositories": {
                name: [
                    {path: hashlib.sha256(content).hexdigest() for path, (content, _) in files.items()}
                    for _, files in repository.commits
                ]
                for name, repository in self.repositories.items()
            },
        }

    def next_fault(self):
        """Counts a request and returns its fault, or `None`."""
        self.count += 1
        is_due = self.count >= self.at if self.lasts else self.count == self.at
        return self.fault if is_due else None


def _copies(repositories):
    copies = {}
    for name, repository in repositories.items():
        copies[name] = Repository(repository.private)
        copies[name].commits = list(repository.commits)
    return copies


class FaultyHandler(Handler):
    """Answers as the loopback Hub does, or fails."""

    def handle_request(self):
        if self.path == CONTROL:
            self.answer(200, self.hub.control(**json.loads(self.body())))
            return
        fault = self.hub.next_fault()
        if fault in STATUSES:
            self.body()
            self.answer(STATUSES[fault], {"error": f"the Hub fails with {fault}"})
        elif fault == "cut":
            self.close_connection = True
        elif fault in ("lost", "half"):
            answer, self.wfile = self.wfile, io.BytesIO()
            super().handle_request()
            content = self.wfile.getvalue() if fault == "half" else b""
            self.wfile = answer
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            if fault == "delay":
                time.sleep(DELAY_S)
            super().handle_request()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815


class HubClient:
    """
    Starts a `FaultyHub` in a process of its own, and controls it.

    Attributes:
        url: value for HF_ENDPOINT.
        token: value for HF_TOKEN.
    """

    token = TOKEN

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, __file__], text=True, **pipes)
        self.url = self.process.stdout.readline().strip()

    def control(self, command, **fields):
        """As `FaultyHub.control`."""
        body = json.dumps({"command": command, **fields}).encode()
        with urlopen(Request(self.url + CONTROL, data=body), timeout=30) as response:
            return json.load(response)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    with FaultyHub() as hub:
        print(hub.url, flush=True)
        sys.stdin.read()
