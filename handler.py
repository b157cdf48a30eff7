"""
What a Hugging Face Inference Endpoint runs of a model repository: it finds this file there by its name.

    curl https://... -H "Authorization: Bearer hf_..." -H "Content-Type: audio/wav" --data-binary @clip.wav

or JSON, with the audio in base64: `{"inputs": "UklGR...", "parameters": {"return_timeline": true}}`. The endpoint
answers with what is returned here, or, with status 400, with the message of what is raised here.
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
                `"inputs"`: the audio. The content of a file as `bytes`, which an endpoint makes of a body of audio, or
                as `str` in base64; or a waveform: `{"array": [...], "sampling_rate": int}`, or a list of numbers at the
                rate of the model. Never a path or a URL: whoever asks must not choose what this machine opens.
                `"parameters"` (*optional*): options of the pipeline, by their names. `strict` is true if it is not
                given, because nobody would see the warning. Numbers and truth values may be text, as an endpoint gives
                those that stand in the query of a URL.

        Returns:
            What the pipeline returns: `[{"label": str, "score": float}, ...]`, or a `dict` with further results.

        Raises:
            ValueError, TypeError: on anything else, and on audio as in the pipeline.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError("got no 'inputs'; expected the content of an audio file")
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters: got {type(parameters).__name__}; expected options by their names")
        given = {name: _value(name, value) for name, value in parameters.items()}
        return self.emotion_share(_audio(data["inputs"]), **{"strict": True, **given})


def _audio(inputs):
    """As the pipeline takes it."""
    if isinstance(inputs, str):
        try:
            inputs = base64.b64decode(inputs, validate=True)
        except ValueError as error:
            raise ValueError(
                f"inputs: got text that is not base64 ({error}); expected the content of an audio file, no path or URL"
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
        raise ValueError(f"inputs: got a waveform that is no list of numbers ({error})") from error


def _value(name, value):
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = repr(value)
    if not isinstance(value, bool | int | float):
        raise ValueError(f"parameters: {name}: got {value}; expected a number, true or false")
    return value
