"""Files that were cut off, files that are whole, and files whose writer never knew how long they would be."""

import io
import warnings
from functools import cache

import numpy as np
import pytest
import soundfile
from conftest import speech
from hypothesis import given, settings
from hypothesis import strategies as st

from emoshare import containers_emoshare, load_audio
from emoshare.audio_emoshare import AudioInfo, audio_info
from emoshare.containers_emoshare import Patched, contents

# Not RAW, which has no header, and SD2, whose header is a second file. libsndfile cannot read the DWVW that it writes.
FORMATS = {
    name: [encoding for encoding in soundfile.available_subtypes(name) if not encoding.startswith("DWVW")]
    for name in sorted(soundfile.available_formats())
    if name not in ("RAW", "SD2")
}
# Containers in which truncation shows: in their headers, or because libsndfile refuses the rest.
CHECKED = {"AIFF", "AU", "CAF", "FLAC", "HTK", "MP3", "NIST", "OGG", "RF64", "SVX", "W64", "WAV", "WAVEX"}


@cache
def encoded(format, encoding=None, num_samples=20000, channels=1, sampling_rate=16000):
    """The bytes of a file; `None` if libsndfile does not write such a file."""
    waveform = speech(1.5)[3000 : 3000 + num_samples] / 2
    waveform = np.stack([waveform / number for number in range(1, channels + 1)], axis=1)
    file = io.BytesIO()
    try:
        soundfile.write(file, waveform, sampling_rate, format=format, subtype=encoding)
    except soundfile.LibsndfileError:
        return None
    return file.getvalue()


def with_bytes(file, position, new):
    return file[:position] + new + file[position + len(new) :]


@pytest.mark.parametrize("format", FORMATS)
def test_whole_files_of_every_format_are_not_reported(format):
    for encoding in FORMATS[format]:
        for channels, num_samples in ((1, 20000), (2, 999), (3, 3001)):
            file = encoded(format, encoding, num_samples, channels)
            if file is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    waveform = load_audio(file)
                    info = audio_info(file)
                assert len(waveform) == -(-info.num_samples * 16000 // info.sampling_rate)
                assert info.num_samples >= 0.99 * num_samples  # the last block of 24-bit PAF is lost in libsndfile


@given(
    format=st.sampled_from(sorted(CHECKED)),
    channels=st.integers(1, 2),
    fraction=st.floats(0.3, 0.99),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_files_that_were_cut_are_refused(format, channels, fraction, data):
    encoding = data.draw(st.sampled_from(FORMATS[format]))
    file = encoded(format, encoding, channels=channels)
    if file is not None:
        for read in (load_audio, audio_info):
            with pytest.raises(ValueError, match=r"clip\.xyz: "):
                read({"bytes": file[: int(len(file) * fraction)], "path": "clip.xyz"})


@pytest.mark.parametrize("format", ["WAV", "AIFF", "CAF", "MP3"])
def test_what_is_there_is_heard_with_one_warning(format, tmp_path):
    path = tmp_path / f"half.{format.lower()}"
    file = encoded(format)
    path.write_bytes(file[: len(file) * 6 // 10])
    with pytest.warns(UserWarning, match=rf"half\.{format.lower()}: its header promises .* are there") as warned:
        waveform = load_audio(path, strict=False)
    assert len(warned) == 1
    assert 10_000 < len(waveform) < 13_000  # of 20,000; MP3 has frames of many sizes
    np.testing.assert_allclose(waveform[:10_000], load_audio(file)[:10_000], atol=0.02 if format == "MP3" else 0)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("WAV", "its header promises 40,000 bytes of samples, and 39,998 are there"),
        ("NIST", "its header promises 40,000 bytes of samples, and 39,998 are there"),
        ("OGG", "it ends within a page, at byte"),
        ("MP3", "its header promises 37 frames, and 36 are there"),
        ("FLAC", "cannot be decoded to its end"),
    ],
)
def test_two_bytes_too_few_show(format, message):
    with pytest.raises(ValueError, match=message):
        load_audio(encoded(format)[:-2])


@pytest.mark.parametrize("counted", [36, 44])
def test_a_writer_may_have_counted_the_header(counted):
    wav = encoded("WAV")
    size = (len(wav) - 44 + counted).to_bytes(4, "little")
    assert len(load_audio(wav[:40] + size + wav[44:])) == len(load_audio(wav))


def test_an_empty_aiff_with_a_chunk_behind_its_samples_is_empty():
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0, np.float32), 16000, format="AIFF")
    aiff = empty.getvalue() + b"ANNO" + (3200).to_bytes(4, "big") + bytes(range(200)) * 16
    aiff = aiff[:4] + (len(aiff) - 8).to_bytes(4, "big") + aiff[8:]
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(aiff)


def test_a_cut_shows_behind_a_chunk_of_odd_length():
    wav = encoded("WAV")
    with pytest.raises(ValueError, match="promises 40,000 bytes of samples, and 39,998 are there"):
        load_audio((wav[:12] + b"junk\x03\0\0\0abc\0" + wav[12:])[:-2])


def test_whole_files_with_other_chunks_around_the_samples_are_not_reported():
    wav, mp3 = encoded("WAV"), encoded("MP3")
    odd = b"junk\x03\0\0\0abc\0"
    files = [
        wav + b"LIST\x04\0\0\0abcd",
        wav + odd,
        wav + b"id3 \x05\0\0\0ab",  # cut, but behind the samples
        wav[:12] + odd + wav[12:],
        mp3 + b"TAG" + bytes(125),
        mp3 + b"APETAGEX" + bytes(24),
        b"ID3\x04\0\0\0\0\x01\0" + bytes(128) + mp3,
        encoded("OGG") + bytes(10),
    ]
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(load_audio(file)) == audio_info(file).num_samples == 20000


# Writers that do not know the length


def unclosed(format, size):
    """A file whose header says `size` bytes of samples."""
    file = encoded(format)
    name, offset, byteorder, size_bytes = {
        "WAV": (b"data", 4, "little", 4),
        "AIFF": (b"SSND", 4, "big", 4),
        "CAF": (b"data", 4, "big", 8),
        "W64": (b"data", 16, "little", 8),
        "AU": (b".snd", 8, "big", 4),
        "RF64": (b"ds64", 16, "little", 8),
    }[format]
    position = file.index(name) + offset
    return with_bytes(file, position, (size % (1 << 8 * size_bytes)).to_bytes(size_bytes, byteorder))


@pytest.mark.parametrize(
    ("format", "sizes"),
    [
        ("WAV", [0, -1, 0x7FFFFFFF, 0x7FFFF000, 0x80000000]),
        ("AIFF", [0, 8, -1, 0x7F000008]),
        ("AU", [0, -1, 0x7FFFFFFF]),
        ("CAF", [0, 4, -1]),
        ("W64", [0, 24, -1, (1 << 63) - 1]),
        ("RF64", [0, -1]),
    ],
)
def test_a_size_that_the_writer_did_not_know_promises_nothing(format, sizes):
    for size in sizes:
        file = unclosed(format, size)
        np.testing.assert_array_equal(load_audio(file), load_audio(encoded(format)))
        assert audio_info(file) == AudioInfo(20000, 16000)
        assert audio_info(file[:-20000]) == AudioInfo(10000, 16000)


def test_a_wav_without_samples_is_empty_and_not_unclosed():
    empty = encoded("WAV", num_samples=0)
    for file in (empty, empty + b"LIST\x04\0\0\0abcd", empty + b"LIST\x03\0\0\0abc\0"):
        with pytest.raises(ValueError, match="holds no samples"):
            load_audio(file)


def test_flac_from_a_pipe_is_read():
    flac = encoded("FLAC")
    of_unknown_length = with_bytes(flac, 21, bytes([flac[21] & 0xF0, 0, 0, 0, 0]))  # the number of samples, 36 bits
    np.testing.assert_array_equal(load_audio(of_unknown_length), load_audio(flac))
    assert audio_info(of_unknown_length) == AudioInfo(20000, 16000)
    for read in (load_audio, audio_info):
        with pytest.raises(ValueError, match="cannot be decoded to its end"):
            read(of_unknown_length[: len(flac) // 2])


# MP3


@cache
def mp3_of_changing_frames():
    """Noise and silence in turn: frames of many sizes. With and without its first frame, which says how many follow."""
    waveform = np.random.default_rng(0).standard_normal(64000) / 10 * np.repeat([1, 0, 1, 0], 16000)
    file = io.BytesIO()
    soundfile.write(file, waveform, 16000, format="MP3", bitrate_mode="VARIABLE")
    whole = file.getvalue()
    assert whole[13:17] == b"Xing"
    second = whole.index(whole[:2], 4)
    return whole, whole[second:]


def test_an_mp3_without_a_number_of_frames_is_read_to_its_end():
    """libsndfile reads as many samples as it estimates from the size of the first frame, here a fifth."""
    whole, without = mp3_of_changing_frames()
    assert soundfile.info(io.BytesIO(without)).frames < 32000
    waveform = load_audio(without)
    assert len(waveform) >= 64000
    # The header also says how many samples of the first frames are the encoder's delay, 1105 of 576 + 529.
    np.testing.assert_allclose(waveform[576:40000], load_audio(whole)[: 40000 - 576], atol=1e-3)
    with pytest.raises(ValueError, match="its last frame is cut off"):
        load_audio(without[:-10])


def test_an_mp3_whose_writer_did_not_know_the_number_of_frames_is_read_to_its_end():
    whole, _ = mp3_of_changing_frames()
    of_unknown_length = with_bytes(whole, 21, bytes(4))
    assert len(load_audio(of_unknown_length)) >= 64000
    with pytest.raises(ValueError, match="its last frame is cut off"):
        load_audio(of_unknown_length[:-10])


def test_an_mp3_that_lacks_its_last_frame_is_reported():
    whole, _ = mp3_of_changing_frames()
    last = whole.rindex(whole[:2])
    with pytest.raises(ValueError, match="its header promises 114 frames, and 113 are there"):
        audio_info(whole[:last])
    # Some writers count the frame with the number of frames, too: 115. The number of bytes tells the two apart.
    count_and_bytes = (115).to_bytes(4, "big") + len(whole).to_bytes(4, "big")
    assert whole[21:25] == (114).to_bytes(4, "big")
    assert audio_info(with_bytes(whole, 21, count_and_bytes)).num_samples >= 64000


def test_frames_of_any_header_are_looked_at_without_an_error():
    headers = [bytes([0xFF, 0xE0 + second, third, 0xC0]) for second in range(32) for third in range(256)]
    frames = [frame for frame in map(containers_emoshare._mpeg_frame, headers) if frame is not None]
    assert len(frames) == 3 * 3 * 2 * 14 * 3 * 2 * 2  # versions, layers, checksum, bit rates, rates, padding, private
    assert min(frame.num_bytes for frame in frames) >= 24
    assert max(frame.num_bytes for frame in frames) <= 2881


def test_two_mp3s_one_after_the_other_are_reported():
    whole, _ = mp3_of_changing_frames()
    with pytest.raises(ValueError, match="its header promises 114 frames, and 229 are there"):
        load_audio(whole + whole)


# Ogg


def test_ogg_without_its_last_page_or_with_a_damaged_one_is_reported():
    ogg = encoded("OGG")
    last = ogg.rindex(b"OggS")
    middle = ogg.index(b"OggS", len(ogg) // 3)
    damaged = with_bytes(ogg, middle + 100, bytes(50))
    cases = [
        (ogg[:last], "its last page is missing"),
        (damaged, f"the page at byte {middle:,} is damaged"),
        (with_bytes(ogg, middle, bytes(10)), f"the page at byte {middle:,} is damaged"),
    ]
    for file, message in cases:
        for read in (load_audio, audio_info):
            with pytest.raises(ValueError, match=message):
                read(file)


def test_streams_one_after_the_other_are_all_heard(tmp_path):
    """libsndfile reads the first of them alone."""
    for encoding in ("VORBIS", "OPUS"):
        streams = [
            encoded("OGG", encoding, num_samples, channels)
            for num_samples, channels in ((20000, 1), (8000, 2), (900, 1))
        ]
        assert len({stream[14:18] for stream in streams}) == 3
        (tmp_path / "chained.ogg").write_bytes(b"".join(streams))
        for audio in (tmp_path / "chained.ogg", b"".join(streams)):
            np.testing.assert_array_equal(load_audio(audio), np.concatenate([load_audio(stream) for stream in streams]))
            assert audio_info(audio) == AudioInfo(28900, 16000)
        cut = b"".join(streams)[:-100]
        with pytest.raises(ValueError, match="it ends within a page"):
            load_audio(cut)
    other_rate = encoded("OGG", sampling_rate=8000)
    with pytest.raises(ValueError, match="holds streams at 16,000 and 8,000 Hz"):
        load_audio(encoded("OGG") + other_rate)


# Any bytes


@given(data=st.data(), format=st.sampled_from(sorted(CHECKED)))
@settings(max_examples=150, deadline=None)
def test_headers_of_any_bytes_are_looked_at_without_an_error(data, format):
    file = bytearray(encoded(format, num_samples=2000))
    for position in data.draw(st.lists(st.integers(0, 120), max_size=8)):
        file[position] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    found = contents(io.BytesIO(file))
    assert found.fault is None or isinstance(found.fault, str)
    assert len(found.head) <= len(file) + 1500


def test_a_file_with_another_head_reads_as_one():
    found = contents(io.BytesIO(unclosed("WAV", 0)))
    file = Patched(io.BytesIO(unclosed("WAV", 0)), found.head, found.skipped)
    whole = found.head + unclosed("WAV", 0)[found.skipped :]
    assert file.seek(0, io.SEEK_END) == len(whole)
    for position in (0, 30, found.skipped - 5, found.skipped, found.skipped + 5):
        file.seek(position)
        assert file.read(10) == whole[position : position + 10]
        assert file.tell() == position + 10
