"""Files of segments, as other programs write them."""

from pathlib import Path

import pytest

from emoshare.conversations.segment_files import read_segments

RTTM = """\
;; from a diarization
SPKR-INFO meeting 1 <NA> <NA> <NA> unknown ada <NA> <NA>
SPEAKER meeting 1 0.500 1.250 <NA> <NA> ada <NA> <NA>

SPEAKER other 1 0.000 9.000 <NA> <NA> eve <NA> <NA>
SPEAKER meeting 1 1.0 2.0 <NA> <NA> <NA> <NA> <NA>
SPEAKER meeting 1 4.5 0.5 <NA> <NA> bo <NA>
"""
CSV = """\
speaker, end,start,note
ada,1.75,0.5,"a, b"

,3.0,1.0,
bo,5,4.5,x
"""
SRT = """\
1
00:00:00,500 --> 00:00:01,750
Ada: Good morning,
Bo: said nobody.

2
00:00:01.000 --> 00:00:03,0 X1:40 X2:600 Y1:20 Y2:50
It is 12:30 now.

3
01:02:04,500 --> 01:02:05,000

4
01:00:06,000 --> 01:00:07,000
[SPEAKER_01]: Yes.
"""
LABELS = "0.500000\t1.750000\tAda: hello\n\\\t100.0\t200.0\n1.0\t3.0\t\n4.5\t5.0\tBo: x\ty\n"
TEXTGRID = """\
File type = "ooTextFile"
Object class = "TextGrid"

0
5
<exists>
2
"IntervalTier"
"ada"
0
5
3
0
0.5
""
0.5
1.75
"hm"
1.75
5
" "
"IntervalTier"
"words"
0
5
1
0
5
"x"
"""


def read(path, content, recording="meeting.wav", tiers=None, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    found = read_segments(path, recording, tiers)
    assert all(segment["place"].startswith(f"{path}, row ") for segment in found)
    return [
        (segment["start"], segment["end"], segment["speaker"], int(segment["place"].rpartition(" ")[2]))
        for segment in found
    ]


def test_rttm(tmp_path):
    for channel in ("2", "<NA>"):
        row = f"SPEAKER meeting {channel} 0.5 1.25 <NA> <NA> ada"
        assert read(tmp_path / "a.rttm", row) == [(0.5, 1.75, "ada", 1)]
    expected = [(0.5, 1.75, "ada", 3), (1.0, 3.0, None, 6), (4.5, 5.0, "bo", 7)]
    assert read(tmp_path / "a.rttm", RTTM) == expected
    assert read(tmp_path / "a.RTTM", RTTM, recording="folder/other.flac") == [(0.0, 9.0, "eve", 5)]
    # A single recording may have any name.
    assert read(tmp_path / "a.rttm", RTTM.replace("other", "meeting"), "clip.wav")[1] == (0.0, 9.0, "eve", 5)
    with pytest.raises(
        ValueError, match=r"a\.rttm: has turns of meeting, other; expected turns of clip, the name of the audio file"
    ):
        read(tmp_path / "a.rttm", RTTM, "clip.wav")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(encoding, tmp_path):
    expected = [(0.5, 1.75, "ada", 2), (1.0, 3.0, None, 4), (4.5, 5.0, "bo", 5)]
    assert read(tmp_path / "a.csv", CSV, encoding=encoding) == expected
    assert read(tmp_path / "b.csv", "start,end\n1,2\n") == [(1.0, 2.0, None, 2)]


SEVERAL = """\
filename,unit,start,end,speaker,Anger
a/one.wav,turn,0.5,1.5,ada,0.1
a/one.wav,recording,,,,0.1
a/two.wav,turn,2.0,3.0,,0.1
a/two.wav,speaker,,,,0.1
b/two.wav,turn,4.0,5.0,,0.1
silence.wav,recording,,,,
"""


@pytest.mark.parametrize(
    ("recording", "expected"),
    [
        ("a/one.wav", [(0.5, 1.5, "ada", 2)]),
        ("elsewhere/one.wav", [(0.5, 1.5, "ada", 2)]),
        (Path("a/two.wav"), [(2.0, 3.0, None, 4)]),
        ("b/two.wav", [(4.0, 5.0, None, 6)]),
    ],
)
def test_of_a_csv_with_several_recordings_the_turns_of_this_one_are_read(recording, expected, tmp_path):
    assert read(tmp_path / "a.csv", SEVERAL, recording) == expected


@pytest.mark.parametrize("recording", ["two.wav", "c/two.wav", "three.wav"])
def test_a_csv_of_several_recordings_must_name_this_one_once(recording, tmp_path):
    names = "a/one.wav, a/two.wav, b/two.wav, silence.wav"
    with pytest.raises(ValueError, match=rf"a\.csv: has turns of {names}; expected turns of {recording}$"):
        read(tmp_path / "a.csv", SEVERAL, recording)


def test_no_recording_takes_the_turns_of_another(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv: holds no segments$"):
        read(tmp_path / "a.csv", SEVERAL, "silence.wav")
    # A single recording may have any name.
    alone = "\n".join(SEVERAL.splitlines()[:3])
    assert read(tmp_path / "a.csv", alone, "clip.wav") == [(0.5, 1.5, "ada", 2)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_srt(newline, tmp_path):
    assert read(tmp_path / "a.srt", SRT.replace("\n", newline)) == [
        (0.5, 1.75, "Ada", 2),
        (1.0, 3.0, None, 7),
        (3724.5, 3725.0, None, 11),
        (3606.0, 3607.0, "SPEAKER_01", 14),
    ]


@pytest.mark.parametrize(
    ("text", "speaker"),
    [
        ("Ada: hello", "Ada"),
        ("  Dr. Ada Lovelace: hello", "Dr. Ada Lovelace"),
        ("Ada:", "Ada"),
        ("[Ada]: hello", "Ada"),
        ("at 12:30", None),
        ("he said to all of us: no", None),
        ("hello", None),
        (": hello", None),
    ],
)
def test_the_speaker_of_a_subtitle_is_what_its_text_begins_with(text, speaker, tmp_path):
    assert read(tmp_path / "a.srt", f"1\n00:00:01,000 --> 00:00:02,000\n{text}\n")[0][2] == speaker


def test_audacitys_labels(tmp_path):
    assert read(tmp_path / "a.txt", LABELS) == [(0.5, 1.75, "Ada", 1), (1.0, 3.0, None, 3), (4.5, 5.0, "Bo", 4)]


def test_textgrid(tmp_path):
    path = tmp_path / "a.TextGrid"
    assert read(path, TEXTGRID, encoding="utf-16") == [(0.5, 1.75, "ada", 16), (0.0, 5.0, "words", 27)]
    assert read(path, TEXTGRID, tiers=["ada"]) == [(0.5, 1.75, "ada", 16)]
    with pytest.raises(ValueError, match=r"a\.TextGrid: has no interval tier 'eve'; it has \['ada', 'words'\]"):
        read(path, TEXTGRID, tiers=["ada", "eve"])
    with pytest.raises(ValueError, match=r"--tier: is for a TextGrid; got .*a\.csv"):
        read(tmp_path / "a.csv", CSV, tiers=["ada"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "start,end\n1,2\n3,3\n", "row 3: starts at 3.000 s and ends at 3.000 s"),
        ("a.csv", "start,end\n-1,2\n", "row 2: start is -1.0; expected seconds, 0 or more"),
        ("a.csv", "start,end\n1,2,3\n", "row 2: has 3 fields; expected 2, as in the header"),
        ("a.csv", "start,end\n1,soon\n", "row 2: end is 'soon'; expected seconds"),
        ("a.csv", "start,end\n1,inf\n", "row 2: end is inf; expected seconds, 0 or more"),
        ("a.csv", "begin,end\n1,2\n", "row 1: got the columns ['begin', 'end']; expected start, end and"),
        ("a.csv", "start,end\n", "a.csv: holds no segments"),
        ("a.csv", "", "row 1: got the columns []"),
        ("a.rttm", "SPEAKER a 1 0.5 <NA> <NA> <NA> ada <NA> <NA>\n", "row 1: duration is '<NA>'; expected seconds"),
        ("a.rttm", "SPEAKER a 1 0.5\n", "row 1: has 4 fields; expected 8 to 10, as in RTTM"),
        (
            "a.rttm",
            "SPEAKER my meeting 1 0.500 3.200 <NA> <NA> ada <NA> <NA>\n",
            "row 1: has 11 fields; expected 8 to 10, as in RTTM, and no spaces in names",
        ),
        (
            "a.rttm",
            "SPEAKER my meeting 1 0.500 3.200 <NA> <NA> ada <NA>\n",
            "row 1: channel is 'meeting'; expected a number or <NA>, and no spaces in names",
        ),
        ("a.rttm", "SPEAKER a 1 0.5 0 <NA> <NA> ada <NA> <NA>\n", "row 1: starts at 0.500 s and ends at 0.500 s"),
        ("a.srt", "1\n0:00 --> 0:01\nhello\n", "row 2: got '0:00 --> 0:01'; expected times like 00:00:01,500 -->"),
        ("a.srt", "1\n00:00:02,000 --> 00:00:01,000\n", "row 2: starts at 2.000 s and ends at 1.000 s"),
        ("a.txt", "hello\n", "row 1: got 'hello'; expected start, end and text, separated by tabs"),
        ("a.txt", "1\tx\thello\n", "row 1: end is 'x'; expected seconds"),
        ("a.TextGrid", TEXTGRID.replace('1.75\n"hm', '0.25\n"hm'), "row 16: starts at 0.500 s and ends at 0.250 s"),
        ("a.json", "[]", "a.json: expected a segment file that ends in .rttm, .textgrid, .csv, .srt, .txt"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_file_and_row(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=r"expected|holds|starts") as raised:
        read(tmp_path / name, content)
    assert str(raised.value).startswith(str(tmp_path / name))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.csv", "a.rttm", "a.srt", "a.txt"])
def test_what_is_no_text_is_said(name, tmp_path):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match=rf"{name}: not a (CSV|text) file in UTF-8"):
        read_segments(tmp_path / name, "meeting.wav")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_segments(Path("missing.csv"), "meeting.wav")
