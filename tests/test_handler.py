"""
How an Inference Endpoint answers input that it cannot use. `test_remote_code.py` tests valid input, where this package
cannot be imported.
"""

import pytest
import torch

from emoshare.handler import EndpointHandler


@pytest.fixture(scope="module")
def handler(model_folder):
    return EndpointHandler(str(model_folder))


def test_parameters_are_the_pipelines(handler, wav):
    audio = {"inputs": wav.read_bytes()}
    query = {"top_k": "2", "return_timeline": "true", "chunk_length_s": "0.5"}  # as text, as in a URL
    parameters = {"top_k": 2, "return_timeline": True, "chunk_length_s": 0.5}
    expected = handler.emotion_share(str(wav), **parameters)
    assert handler({**audio, "parameters": query}) == handler({**audio, "parameters": parameters}) == expected
    assert len(expected["timeline"]) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"audio": b""}, "got no 'inputs'"),
        ({"inputs": "/etc/passwd"}, r"inputs: (got text that is not base64|not an audio file)"),
        ({"inputs": "https://127.0.0.1/clip.wav"}, "inputs: got text that is not base64 .* not a path or a URL"),
        ({"inputs": {"path": "/etc/passwd"}}, r"inputs: got \['path'\]; expected the content of an audio file"),
        ({"inputs": {"array": ["a"], "sampling_rate": 16000}}, "inputs: got a waveform that is not a list of numbers"),
        ({"inputs": [[0.0, 0.1]]}, r"expected a mono waveform, 1D"),
        ({"inputs": None}, "inputs: got NoneType"),
        ({"inputs": b"no audio"}, "inputs: not an audio file"),
        (
            {"inputs": [0.0] * 16000, "parameters": {"top_k": "many"}},
            "parameters: top_k: got 'many'; expected a number",
        ),
        ({"inputs": [0.0] * 16000, "parameters": {"top_k": 2.5}}, "top_k: got 2.5; expected a whole number"),
        ({"inputs": [0.0] * 16000, "parameters": [2]}, "parameters: got list"),
    ],
)
def test_what_cannot_be_used_is_said(data, message, handler):
    with pytest.raises(ValueError, match=message):
        handler(data)


def test_a_file_that_was_cut_off_is_refused_unless_that_is_wanted(handler, wav):
    cut = {"inputs": wav.read_bytes()[:20000]}
    with pytest.raises(ValueError, match="inputs: its header promises"):
        handler(cut)
    with pytest.warns(UserWarning, match="only the part that can be decoded"):
        assert len(handler({**cut, "parameters": {"strict": False}})) == 9


def test_it_runs_where_there_is_no_gpu(handler):
    assert handler.emotion_share.device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
