"""The small inputs that the campaign breaks: a corpus, a backbone, and the flags of runs on them."""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

ROOT = Path(__file__).resolve().parents[2]
CLIPS = {"train": 14, "devel": 8, "test": 3}
LABELS = ["joy", "awe"]
SECONDS = (0.4, 1.0)  # shortest and longest clip
BACKBONE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
HEADS = {"conv_channels": [8], "lstm_hidden_size": 4, "lstm_num_layers": 1, "ffn_sizes": [4]}
FIELDS = {
    **HEADS,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "bootstrap": 20,
}


# Audio to damage: seconds, subtypes (the format's default if not listed), sampling rates and channels.
AUDIO_SECONDS = 0.4
SUBTYPES = {
    "WAV": ("PCM_16", "PCM_24", "FLOAT", "ULAW", "GSM610", "IMA_ADPCM", "MS_ADPCM", "MPEG_LAYER_III"),
    "OGG": ("VORBIS", "OPUS"),
    "CAF": ("PCM_16", "ALAC_16"),
    "AIFF": ("PCM_16", "FLOAT"),
}
RATES_AND_CHANNELS = [(16000, 1), (8000, 1), (44100, 2)]


def make_everything(place):
    """Makes everything that is killed, fuzzed and published: corpus, backbone, model, feature stores, audio files."""
    make_corpus(place / "corpus")
    make_backbone(place / "backbone")
    make_model(place)
    make_stores(place)
    make_audio(place / "audio")


def make_corpus(folder):
    """Writes a corpus in the ComParE 2023 layout, with facts about its clips."""
    from corpus import write_corpus

    rng = np.random.default_rng(0)
    write_corpus(folder, LABELS, **{split: rng.uniform(*SECONDS, size=size) for split, size in CLIPS.items()})
    facts = ["filename,speaker,age,listeners", "train_00000.wav,eve,31,12", "train_00001.wav,03,27.5,9"]
    (folder / "lab" / "clips.csv").write_text("\n".join([*facts, "devel_00000.wav,?,,20", ""]))
    return folder


def make_backbone(folder):
    """Writes a small HuBERT with random weights."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("hubert", **BACKBONE)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder


def flags(**fields):
    """Turns fields into flags of train.py."""
    words = []
    for name, value in fields.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def training_flags(place, **fields):
    """Flags of a small training run on the corpus and the backbone in `place`."""
    place = Path(place)
    where = {"dataset": "csv", "data_dir": place / "corpus", "backbone": place / "backbone"}
    return flags(**where, **FIELDS, checkpoint_minutes=0, **fields)


def make_model(place):
    """Writes a complete, untrained model repository with the backbone in `place`."""
    from emoshare import EmoShareFeatureExtractor, EmoShareModel

    torch.manual_seed(1)
    model = EmoShareModel.from_backbone_pretrained(place / "backbone", id2label=dict(enumerate(LABELS)), **HEADS)
    model.save_pretrained(place / "model")
    extractor = EmoShareFeatureExtractor.for_backbone(place / "backbone", model.config.backbone_config)
    extractor.save_pretrained(place / "model")
    return place / "model"


def extraction_inputs(place):
    """Returns corpus, model, feature extractor and accelerator."""
    from accelerate import Accelerator

    from emoshare import EmoShareFeatureExtractor, EmoShareModel
    from emoshare.dataset_script import load_corpus

    corpus = load_corpus("csv", data_dir=place / "corpus", cache_dir=place / "cache")
    model = EmoShareModel.from_pretrained(place / "model")
    return corpus, model, EmoShareFeatureExtractor.from_pretrained(place / "model"), Accelerator(cpu=True)


def make_stores(place):
    """Extracts the frame features of the corpus's train split into `place / "stores"`."""
    from emoshare.training.features import extract_frame_features

    corpus, model, feature_extractor, accelerator = extraction_inputs(place)
    extract_frame_features(corpus, "train", model, feature_extractor, place / "stores", accelerator)


def make_audio(folder):
    """Writes a file of each format that soundfile supports."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    # Not SD2: its header is a second file, `._` in the current folder, which libsndfile then uses for any MP3.
    for form in [form for form in soundfile.available_formats() if form != "SD2"]:
        for subtype in SUBTYPES.get(form, (soundfile.default_subtype(form),)):
            for rate, channels in RATES_AND_CHANNELS:
                samples = 0.2 * rng.standard_normal((round(AUDIO_SECONDS * rate), channels)).clip(-4, 4)
                content = io.BytesIO()
                try:
                    soundfile.write(content, samples, rate, subtype, format=form)
                    soundfile.read(io.BytesIO(content.getvalue()))
                except (soundfile.LibsndfileError, ValueError, TypeError):
                    continue  # the format does not support these samples, or needs a file name
                (folder / f"{form}-{subtype}-{rate}-{channels}").write_bytes(content.getvalue())


def publish_heads(place):
    """Publishes the backbone in `place`, and heads without backbone, which fetch it."""
    from huggingface_hub import HfApi

    from emoshare import EmoShareModel

    api = HfApi()
    api.create_repo("org/backbone")
    api.upload_folder(repo_id="org/backbone", folder_path=place / "backbone")
    torch.manual_seed(1)
    model = EmoShareModel.from_backbone_pretrained("org/backbone", id2label=dict(enumerate(LABELS)), **HEADS)
    api.create_repo("org/heads")
    model.save_pretrained(place / "heads", include_backbone=False)
    api.upload_folder(repo_id="org/heads", folder_path=place / "heads")
