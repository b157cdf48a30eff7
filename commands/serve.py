"""`emoshare serve`."""

from functools import partial

from .loading import load_pipeline


def run(arguments):
    """`emoshare serve`: answers requests until a signal arrives, and then the remaining accepted ones."""
    try:
        from ..serving.command import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'emoshare[serve]' has all it takes") from error
    return serve(arguments, partial(load_pipeline, arguments))
