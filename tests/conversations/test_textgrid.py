"""TextGrids: we read what Praat writes, and Praat reads what we write. `parselmouth` is Praat."""

import io

import parselmouth
import pytest

from emoshare.conversations.textgrid import read_textgrid, write_textgrid

PARTS = ("start time", "end time", "label")
TIERS = [
    ("Ada", [(0.5, 1.25, 'so, "what"?'), (1.25, 2.0, "well"), (3.000123, 4.5, "tea ☕ <exists> 1 ! 2")]),
    ("Bo", [(0.0, 5.0, "all\nof it")]),
    ("", [(1e-05, 2.5, "x")]),
]


def written(path, tiers=TIERS, seconds=5.0, encoding="utf-8"):
    file = io.StringIO()
    write_textgrid(file, tiers, seconds)
    path.write_text(file.getvalue(), encoding=encoding)
    return path


def spoken(tiers):
    """Intervals that are not pauses."""
    return [(name, [tuple(interval[:3]) for interval in intervals if interval[2]]) for name, intervals in tiers]


def test_praat_reads_what_is_written(tmp_path):
    grid = parselmouth.read(str(written(tmp_path / "a.TextGrid")))
    assert (grid.xmin, grid.xmax) == (0, 5)
    call = parselmouth.praat.call
    for number, (name, intervals) in enumerate(TIERS, start=1):
        assert call(grid, "Get tier name", number) == name
        found = [
            tuple(call(grid, f"Get {part} of interval", number, index) for part in PARTS)
            for index in range(1, call(grid, "Get number of intervals", number) + 1)
        ]
        assert [interval for interval in found if interval[2]] == intervals


@pytest.mark.parametrize("form", ["text", "short text"])
@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16"])
def test_what_praat_writes_is_read(form, encoding, tmp_path):
    """In both text formats, in UTF-8 or UTF-16 according to Praat's settings, and with a point tier."""
    grid = parselmouth.read(str(written(tmp_path / "a.TextGrid")))
    parselmouth.praat.call(grid, "Insert point tier", 2, "clicks")
    parselmouth.praat.call(grid, "Insert point", 2, 1.5, "k")
    parselmouth.praat.run(f'Text writing preferences: "{encoding}"')
    path = tmp_path / "b.TextGrid"
    parselmouth.praat.call(grid, f"Save as {form} file", str(path))
    assert path.read_bytes().startswith(b"\xfe\xff" if encoding == "UTF-16" else b"File")
    assert spoken(read_textgrid(path)) == TIERS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_and_windows_lines_are_read(encoding, tmp_path):
    text = written(tmp_path / "a.TextGrid").read_text(encoding="utf-8")
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    (tmp_path / "b.TextGrid").write_bytes((mark + text.replace("\n", "\r\n")).encode(encoding))
    expected = [(name, [(start, end, text.replace("\n", "\r\n")) for start, end, text in tier]) for name, tier in TIERS]
    assert spoken(read_textgrid(tmp_path / "b.TextGrid")) == expected


def test_an_interval_knows_its_line(tmp_path):
    path = written(tmp_path / "a.TextGrid")
    lines = path.read_text(encoding="utf-8").splitlines()
    for _, intervals in read_textgrid(path):
        for start, _, _, line in intervals:
            assert lines[line - 1].strip() == f"xmin = {start!r}"


def test_a_textgrid_without_tiers_is_read(tmp_path):
    path = tmp_path / "none.TextGrid"
    path.write_text('"ooTextFile"\n"TextGrid"\n0\n2.5\n<absent>\n')
    assert read_textgrid(path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "row 1: got the end of the file; expected a text"),
        (b"start,end\n0,1\n", "row 3: got the end of the file; expected a text"),
        (b'"ooTextFile"\n"Sound"\n', "a.TextGrid: not a TextGrid in one of Praat's text formats"),
        (b"ooBinaryFile\x08TextGrid\xff", "a.TextGrid: not a TextGrid in UTF-8 or UTF-16"),
        (
            b'"ooTextFile"\n"TextGrid"\n0 2 <exists> 1\n"IntervalTier" "A" 0 2 1\n0 "x"\n',
            'row 5: got "x"; expected a number',
        ),
        (
            b'"ooTextFile"\n"TextGrid"\n0 2 <exists> 1\n"IntervalTier" "A" 0 2 1.5\n',
            "row 4: got 1.5; expected a count",
        ),
        (b'"ooTextFile"\n"TextGrid"\n0 2 <exists> 1\n"IntervalTier" "A" 0 2 2\n0 1 "x"\n', "got the end of the file"),
    ],
)
def test_a_file_that_is_none_is_said_with_its_row(content, message, tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}.*") as raised:
        read_textgrid(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
