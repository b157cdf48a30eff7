import soundfile

from emoshare.dataset_script.examples import CHOSEN, write_examples


def test_short_clips_of_single_voices_and_one_with_a_timeline(tmp_path):
    write_examples(tmp_path / "examples")
    seconds = {path.stem: soundfile.info(path).duration for path in (tmp_path / "examples").iterdir()}
    together = seconds.pop("Synthetic voices, Excitement, then Tiredness, then Anger")
    assert sorted(seconds) == sorted(f"Synthetic voice, {emotion}" for emotion in CHOSEN)
    assert max(seconds.values()) <= 8.0
    assert together == 24.0
