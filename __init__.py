"""
EmoShare: predicts the share of listeners who would perceive each emotion in a speech clip.

Importing this package takes almost no time, so that commands answer `--help` at once. Registering its classes with
Transformers takes seconds, so `registration` does it only when Transformers or one of the classes is imported, whether
before or after this package.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec

# The public names, and the modules that define them.
_MODULES = {
    "EMOTIONS": "fields_emoshare",
    "EmoShareConfig": "configuration_emoshare",
    "EmoShareFeatureExtractor": "feature_extraction_emoshare",
    "EmoShareModel": "modeling_emoshare",
    "EmoShareOutput": "outputs_emoshare",
    "EmotionHead": "head_emoshare",
    "EmotionSharePipeline": "pipeline_emoshare",
    "EmotionShareStream": "stream_emoshare",
    "load_audio": "audio_emoshare",
}
__all__ = [*_MODULES]

# The flat modules that import neither PyTorch nor Transformers.
LIGHT_MODULES = ("architectures_emoshare", "fields_emoshare", "losses_emoshare")


def __getattr__(name):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})


def _register():
    import_module(".registration", __name__)


class _RegisterAfterImport(MetaPathFinder):
    """
    Waits for the first import of Transformers, or of a flat module that imports it, and registers right after that
    import. It cannot register while a flat module is still being imported, because `registration` needs all of it.
    """

    def find_spec(self, name, path=None, target=None):
        package, _, module = name.rpartition(".")
        is_ours = package == __name__ and module.endswith("_emoshare") and module not in LIGHT_MODULES
        if not is_ours and name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
