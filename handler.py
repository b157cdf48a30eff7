"""
The handler of a Hugging Face Inference Endpoint, which finds this file in a model repository by its name.

    curl https://... -H "Authorization: Bearer hf_..." -H "Content-Type: audio/wav" --data-binary @clip.wav

or JSON, with the audio in base64: `{"inputs": "UklGR...", "parameters": {"return_timeline": true}}`. The endpoint
answers with what `EndpointHandler` returns. If that raises an error, it answers with status 400 and the message.
"""

import base64
import json

import numpy as np
import torch
from transformers import pipeline


class EndpointHandler:
    """
    Args:
        path (`str`): folder of the model repository.
    """

    def __init__(self, path=""):
        device = 0 if torch.cuda.is_available() else -1
        self.emotion_share = pipeline("emotion-share", model=path, device=device, trust_remote_code=True)

    def __call__(self, data):
        """
        Args:
            data (`dict`):
                `"inputs"`: the audio: the content of a file, as `bytes` (which an endpoint passes if the request's
                body is audio) or as a base64 `str`; or a waveform, as `{"array": [...], "sampling_rate": int}` or as a
                list of numbers at the model's sampling rate. Never a path or a URL, because clients must not choose
                what this machine opens.
                `"parameters"` (*optional*): options of the pipeline by name. `strict` defaults to true, because nobody
                would see a warning. Numbers and booleans may be text, because endpoints pass those in a URL's query as
                text.

        Returns:
            The pipeline's result: `[{"label": str, "score": float}, ...]`, or a `dict` with further results.

        Raises:
            ValueError, TypeError: if `data` is anything else, and as the pipeline does.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError("got no 'inputs'; expected the content of an audio file")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters: got {type(parameters).__name__}; expected a dict of options")
        given = {name: _value(name, value) for name, value in parameters.items()}
        return self.emotion_share(_audio(data["inputs"]), **{"strict": True, **given})


def _audio(inputs):
    """The audio in a form that the pipeline takes."""
    if isinstance(inputs, str):
        try:
            inputs = base64.b64decode(inputs, validate=True)
        except ValueError as error:
            raise ValueError(
                f"inputs: got text that is not base64 ({error}); expected the content of an audio file, not a path or "
                "a URL"
            ) from error
    if isinstance(inputs, bytes | bytearray):
        return {"bytes": inputs, "path": "inputs"}
    if isinstance(inputs, list):
        return _waveform(inputs)
    if isinstance(inputs, dict) and inputs.keys() == {"array", "sampling_rate"}:
        return {**inputs, "array": _waveform(inputs["array"]), "path": "inputs"}
    raise ValueError(
        f"inputs: got {sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__}; expected the content of "
        "an audio file, a list of numbers, or 'array' and 'sampling_rate'"
    )


def _waveform(numbers):
    try:
        return np.asarray(numbers, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"inputs: got a waveform that is not a list of numbers ({error})") from error


def _value(name, value):
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = repr(value)
    if not isinstance(value, bool | int | float):
        raise ValueError(f"parameters: {name}: got {value}; expected a number, true or false")
    return value
