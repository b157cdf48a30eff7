"""`emoshare serve` as its users see it: over HTTP, in a process of its own."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
from conftest import ROOT, speech, start_script
from transformers import pipeline

from emoshare.cli import main

pytestmark = pytest.mark.slow

LIMITS = {"max_megabytes": 1, "max_seconds": 10, "max_waiting": 40, "upload_seconds": 1}


class Service:
    """A running `emoshare serve`."""

    def __init__(self, process, port, log):
        self.process, self.port, self.log = process, port, log

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/predict"

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ask(self, method, path, content=None, **headers):
        """Status, headers, and the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})
        return read_answer(connection.getresponse())

    def predict(self, content, query="", **headers):
        return self.ask("POST", f"/predict?{query}", content, **headers)

    def metrics(self):
        lines = self.ask("GET", "/metrics")[2].splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def read_answer(response):
    content = response.read().decode()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, response.headers, json.loads(content) if is_json else content


@contextmanager
def serving(folder, model, **flags):
    script, log = folder / "serve.py", folder / "serve.log"
    script.write_text("import sys\nfrom emoshare.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    with log.open("w+") as output:
        process = start_script(script, "serve", model, "--port=0", *arguments, cwd=folder, stdout=output, stderr=output)
        try:
            wait_until(lambda: " is served at http://" in log.read_text() or not process.is_alive())
            lines = [line for line in log.read_text().splitlines() if " is served at " in line]
            assert lines, log.read_text()
            yield Service(process, int(lines[0].rpartition(":")[2].partition("/")[0]), log)
        finally:
            process.terminate()
            process.join()


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder, and the address at which its files can be fetched."""
    folder = tmp_path_factory.mktemp("files")
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Files(*given, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def service(tmp_path_factory, model_folder, files):
    with serving(tmp_path_factory.mktemp("service"), model_folder, allow_url=f"{files[1]}/clips", **LIMITS) as service:
        yield service


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


def assert_shares(answer, expected):
    assert {share["label"]: share["score"] for share in answer} == pytest.approx(
        {share["label"]: share["score"] for share in expected}, abs=1e-5
    )


FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n--b--\r\n'
FORM_TYPE = "multipart/form-data; boundary=b"


def test_audio_comes_as_bytes_as_a_form_and_by_a_url(service, emotion_share, wav, files):
    folder, address = files
    (folder / "clips").mkdir()
    shutil.copy(wav, folder / "clips")
    expected = emotion_share(str(wav))
    for content, headers in (
        (wav.read_bytes(), {}),
        (wav.read_bytes(), {"content_type": "audio/wav"}),
        (wav.read_bytes(), {"content_type": "application/x-www-form-urlencoded"}),  # curl's default
        (iter([wav.read_bytes()[:5000], wav.read_bytes()[5000:]]), {}),
        (FORM % wav.read_bytes(), {"content_type": FORM_TYPE}),
        (json.dumps({"url": f"{address}/clips/{wav.name}"}), {"content_type": "application/json"}),
    ):
        status, _, answer = service.predict(content, **headers)
        assert status == 200, answer
        assert_shares(answer, expected)


def test_options_are_the_pipelines(service, emotion_share, wav):
    query = "top_k=2&return_timeline=true&return_attention=1&chunk_length_s=0.6&stride_length_s=0.1"
    status, _, answer = service.predict(wav.read_bytes(), query)
    expected = emotion_share(
        str(wav), top_k=2, return_timeline=True, return_attention=True, chunk_length_s=0.6, stride_length_s=0.1
    )
    assert status == 200
    assert_shares(answer["shares"], expected["shares"])
    assert [window["start"] for window in answer["timeline"]] == [window["start"] for window in expected["timeline"]]
    for name, values in expected["attention"].items():
        np.testing.assert_allclose(answer["attention"][name], values, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("top_k=0", "top_k: got 0; expected a whole number, 1 or more"),
        ("top_k=many", "top_k: Input should be a valid integer"),
        ("return_timeline=perhaps", "return_timeline: Input should be a valid boolean"),
        ("chunk_length_s=9000", "chunk_length_s: got 9000.0; expected"),
        ("chunk_length_s=nan", "chunk_length_s: Input should be a finite number"),
        ("chunk_length_s=1e305", "chunk_length_s: got 1e+305; expected"),
        ("return_interval=true", "return_interval: this model was trained with loss='mse'"),
        ("topk=2", "topk: Extra inputs are not permitted"),
    ],
)
def test_options_that_do_not_fit_are_refused(query, message, service, wav):
    status, _, answer = service.predict(wav.read_bytes(), query)
    assert (status, answer["detail"][: len(message)]) == (422, message)


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"no audio", {}, 422, "audio: not an audio file"),
        (b"", {}, 422, "audio: not an audio file"),
        (b"x" * (1 << 20) + b"x", {}, 413, "the upload has more than 1,048,576 bytes"),
        (b"no form", {"content_type": FORM_TYPE}, 400, "Invalid multipart data"),
        (b"--b--\r\n", {"content_type": FORM_TYPE}, 400, "expected a form with a file and nothing else"),
        (FORM.replace(b'; filename="a.wav"', b"") % b"2", {"content_type": FORM_TYPE}, 400, "expected a form with a"),
        (FORM % b"no audio", {"content_type": FORM_TYPE}, 422, "audio: not an audio file"),
        (b"{", {"content_type": "application/json"}, 400, "the body is not valid JSON"),
        (b'{"path": "/etc/passwd"}', {"content_type": "application/json"}, 422, "the JSON has no URL"),
        (b'{"url": "/etc/passwd"}', {"content_type": "application/json"}, 403, "'/etc/passwd' is not a URL"),
        (
            b'{"url": "http://127.0.0.1:1/"}',
            {"content_type": "application/json"},
            403,
            "'http://127.0.0.1:1/' is not among the URLs",
        ),
        (b"[" * (1 << 17), {"content_type": "application/json"}, 413, "the JSON has more than 65,536 bytes"),
        (b"[" * 5000, {"content_type": "application/json"}, 400, "the body is not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_said(content, headers, status, message, service):
    found, _, answer = service.predict(content, **headers)
    assert (found, answer["detail"][: len(message)]) == (status, message)


def test_a_long_clip_is_refused(service, tmp_path):
    soundfile.write(tmp_path / "hour.flac", np.zeros(3600 * 4000), 4000)
    status, _, answer = service.predict((tmp_path / "hour.flac").read_bytes())
    assert (status, answer["detail"]) == (413, "audio: lasts more than 10 s")


def test_a_clip_that_was_cut_off_is_refused_unless_that_is_wanted(service, wav):
    cut = wav.read_bytes()[:20000]
    status, headers, answer = service.predict(cut)
    assert (status, headers["warning"]) == (422, None)
    assert answer["detail"].startswith("audio: its header promises")
    status, headers, answer = service.predict(cut, "strict=false")
    assert (status, len(answer)) == (200, 9)
    assert headers["warning"].count("only the part that can be decoded is used") == 1


HEAD = b"POST /predict HTTP/1.1\r\nHost: me\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def test_an_upload_that_grows_too_large_is_answered_while_it_is_sent(service):
    with service.connect() as connection:
        connection.sendall(CHUNKED)
        for _ in range(20):
            connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")  # 1.25 MB, and it does not end
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        connection.settimeout(10)
        with pytest.raises(ConnectionError):  # what comes after it is received for a while, and then no more
            while True:
                connection.sendall(b"1\r\nx\r\n")
                time.sleep(0.1)


def test_a_slow_upload_is_answered(service):
    began = time.monotonic()
    with service.connect() as connection:
        connection.sendall(CHUNKED + b"4\r\nRIFF\r\n")
        for _ in range(9):
            time.sleep(0.1)
            connection.sendall(b"1\r\nx\r\n")
        response = HTTPResponse(connection)
        response.begin()
        answer = json.load(response)
    assert (response.status, answer["detail"]) == (408, "the upload took more than 1 s")
    assert 0.9 < time.monotonic() - began < 5


def test_a_refusal_that_needs_no_body_does_not_wait_for_it(service):
    with service.connect() as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: me\r\nContent-Length: 9000000\r\n\r\nRIFF")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_many_clients_lose_nothing_and_broken_clips_fail_alone(service, emotion_share, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    expected = {}
    for number in range(12):
        path = folder / f"{number:02d}.wav"
        soundfile.write(path, speech(0.3 + 0.1 * number, seed=number), 16000)
        expected[path.name] = emotion_share(str(path))
    (folder / "text.wav").write_text("no audio")
    before = service.metrics()
    command = [sys.executable, ROOT / "benchmarks" / "clients.py", service.url, folder, 130, 32]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    answers = json.loads(result.stdout)["answers"]
    assert len(answers) == 130
    for answer in answers:
        if answer["clip"] == "text.wav":
            assert answer["status"] == 422
        else:
            assert answer["status"] == 200
            assert_shares(answer["answer"], expected[answer["clip"]])
    after = service.metrics()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown['emoshare_requests_total{status="200"}'] == 120
    assert grown['emoshare_requests_total{status="422"}'] == 10
    assert grown["emoshare_request_seconds_count"] == 130
    assert grown["emoshare_batch_windows_sum"] == 120
    assert grown["emoshare_batch_windows_count"] < 100  # so some went together
    assert after["emoshare_waiting_clips"] == 0


def test_its_pages(service):
    assert service.ask("GET", "/health")[::2] == (200, {"status": "ok"})
    schema = service.ask("GET", "/openapi.json")[2]
    described = schema["paths"]["/predict"]["post"]
    assert "top_k" in [parameter["name"] for parameter in described["parameters"]]
    assert {"200", "408", "413", "422", "503"} <= set(described["responses"])
    assert set(described["requestBody"]["content"]) >= {"multipart/form-data", "application/json"}
    assert service.ask("GET", "/docs")[0] == 200
    assert service.ask("GET", "/predict")[0] == 405
    assert service.process.is_alive()
    assert "Traceback" not in service.log.read_text()


def test_sigterm_ends_it_when_what_was_accepted_has_its_answer(model_folder, emotion_share, wav, tmp_path):
    content, long = wav.read_bytes(), tmp_path / "long.wav"
    soundfile.write(long, speech(60.0), 16000)
    with serving(tmp_path, model_folder, batch_size=2) as service:
        with service.connect() as half, service.connect() as idle:
            half.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content[:10000])
            answers = []
            clients = [
                threading.Thread(target=lambda: answers.append(service.predict(long.read_bytes()))) for _ in range(6)
            ]
            for client in clients:
                client.start()
            wait_until(lambda: service.metrics()["emoshare_waiting_clips"] == 6)
            service.process.terminate()
            wait_until(lambda: idle.recv(1) == b"")
            with pytest.raises(ConnectionError):
                service.connect()
            half.sendall(content[10000:])
            for client in clients:
                client.join()
            assert [status for status, *_ in answers] == [200] * 6
            head, _, body = receive_all(half).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert_shares(json.loads(body), emotion_share(str(wav)))
        service.process.join(30)
        assert service.process.exitcode == 0
        assert "Traceback" not in service.log.read_text()


def receive_all(connection):
    received = b""
    while part := connection.recv(1000):
        received += part
    return received


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--allow_url", "ftp://host"], "--allow_url: 'ftp://host' is not a URL that can be fetched"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: Cannot assign requested address"),
        (["--revision", "main", "--port", "0"], "--revision: is for repositories on the Hub"),
    ],
)
def test_what_cannot_be_served_is_said(arguments, message, model_folder, capfd):
    assert main(["serve", str(model_folder), *arguments]) == 2
    (error,) = (line for line in capfd.readouterr().err.splitlines() if "error" in line)
    assert error.startswith(f"emoshare serve: error: {message}")


def test_a_model_that_is_not_there_is_named_as_it_was_given(capfd):
    assert main(["serve", "./missing", "--port=0"]) == 2
    assert capfd.readouterr().err.startswith("emoshare serve: error: MODEL: got './missing'; expected a folder")


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(model_folder, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "no/such/model", "--port", port]) == 2
    assert f"--host 127.0.0.1 --port {port}: Address already in use" in capfd.readouterr().err


def test_what_it_takes_is_said_where_it_is_not_installed(monkeypatch, capfd):
    for name in [name for name in sys.modules if name.startswith("emoshare.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "no/such/model"]) == 2
    assert "uvicorn" in capfd.readouterr().err
