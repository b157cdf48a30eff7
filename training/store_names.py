"""The names of feature stores: fingerprints of everything that determines their features."""

import hashlib
import json
from functools import cached_property, partial

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object

from ..dataset_script.audio import audio_files, clips_fingerprint
from ..dataset_script.digests import Entry, blocks, keep, kept, read_files, unknown_files
from ..finetuning_emoshare import tuned_names
from .model import load_left_out_backbone
from .user_errors import on_main_process, together

# Part of every store's name. Increase this when the code computes different features from the same input.
FEATURES_VERSION = 3


def read_clips_together(corpus, accelerator):
    """
    Reads the clips whose digests are unknown, a part of them on each process, so that the main one then knows all.

    Args:
        corpus: `Corpus`.
        accelerator: `accelerate.Accelerator`.

    Raises:
        UserError: if a clip cannot be read.
    """
    if accelerator.num_processes == 1:
        return  # it reads clips when it needs their digests

    def unknown():
        of_splits = map(audio_files, corpus.as_stored.splits.values())
        return unknown_files([path for paths in of_splits for path in paths if path is not None])

    paths = on_main_process(unknown, accelerator)
    (paths,) = broadcast_object_list([paths])
    for some in blocks(paths):
        mine = some[accelerator.process_index :: accelerator.num_processes]
        read = gather_object(together(partial(read_files, mine)))
        if accelerator.is_main_process:
            keep(read)


class StoreNames:
    """
    The names of the stores for a model.

    Args:
        model: `EmoShareModel`. A backbone that `build_model` has left out is loaded if a name is unknown.
        feature_extractor: `EmoShareFeatureExtractor`.
        dtype: of the stored features.
        weights_hash: `backbone_emoshare.weights_hash` of the backbone in float32, as `build_model` found it. Names are
            then cached from run to run, so that the weights need not be read again. `None` reads the weights.
    """

    def __init__(self, model, feature_extractor, dtype, weights_hash=None):
        versions = f"{FEATURES_VERSION} {transformers.__version__} {torch.__version__}"
        settings = {name: value for name, value in feature_extractor.to_dict().items() if name != "auto_map"}
        self._settings = json.dumps([versions, dtype, settings], sort_keys=True)
        self._model, self._weights_hash = model, weights_hash

    def of(self, clips, layers):
        """
        Args:
            clips: a split, a `datasets.Dataset`.
            layers: each as `EmoShareConfig.backbone_layer`.

        Returns:
            `dict` from layer to the hexadecimal name of its store.
        """
        fingerprint = clips_fingerprint(clips)
        if self._weights_hash is None:
            return {layer: self._name(fingerprint, layer) for layer in layers}
        key = hashlib.blake2b(json.dumps([self._settings, self._backbone_config, self._weights_hash]).encode())
        keys = {layer: b"store %s" % json.dumps([key.hexdigest(), fingerprint, layer]).encode() for layer in layers}
        found = kept(dict.fromkeys(keys.values(), b""))
        names = {layer: found.get(key) or self._name(fingerprint, layer).encode() for layer, key in keys.items()}
        keep(Entry(key, b"", names[layer]) for layer, key in keys.items() if key not in found)
        return {layer: name.decode() for layer, name in names.items()}

    def _name(self, fingerprint, layer):
        digest = self._of_model.copy()
        digest.update(fingerprint.encode())
        digest.update(json.dumps(layer).encode())
        return digest.hexdigest()

    @cached_property
    def _of_model(self):
        """The digest of what determines the features of any split and layer; reads all weights of the backbone."""
        digest = hashlib.blake2b(self._settings.encode(), digest_size=16)
        load_left_out_backbone(self._model)
        if self._model.backbone is not None:
            digest.update(self._backbone_config.encode())
            # New adapters are random, but do not change the output.
            adapters = tuned_names(self._model.backbone, self._model.config) if self._model.config.lora_rank else ()
            for name, tensor in sorted(self._model.backbone.state_dict().items()):
                if name in adapters:
                    continue
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest

    @property
    def _backbone_config(self):
        return self._model.config.backbone_config.to_json_string()
