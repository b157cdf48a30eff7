"""
Clients of `emoshare serve`, in a process with light imports only, so that they take little CPU time from the server.

    python benchmarks/clients.py URL FOLDER REQUESTS CLIENTS

Posts the clips of FOLDER in rotation to URL, REQUESTS in total, from CLIENTS connections that each wait for an answer.
Prints JSON: `{"seconds": ..., "answers": [{"clip", "status", "seconds", "answer"}, ...]}`.
"""

import json
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import urlsplit


def main(url, folder, num_requests, num_clients):
    clips = [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]
    work, answers, lock = iter(range(int(num_requests))), [], Lock()

    def ask():
        server = urlsplit(url)
        connection = HTTPConnection(server.hostname, server.port)
        while True:
            with lock:
                number = next(work, None)
            if number is None:
                return
            name, content = clips[number % len(clips)]
            began = time.perf_counter()
            connection.request("POST", f"{server.path}?{server.query}", content)
            response = connection.getresponse()
            answer = json.loads(response.read())
            answers.append(
                {"clip": name, "status": response.status, "seconds": time.perf_counter() - began, "answer": answer}
            )

    clients = [Thread(target=ask) for _ in range(int(num_clients))]
    began = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    print(json.dumps({"seconds": time.perf_counter() - began, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
