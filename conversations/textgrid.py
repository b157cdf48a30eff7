"""Praat's TextGrid files: reads the long and the short text format, writes the long one."""

import codecs
import re
from itertools import pairwise

# From a text file, Praat reads free-standing quoted text, numbers and <flags>. It skips everything else, which is what
# makes the long format long. `!` begins a comment.
TOKEN = re.compile(
    r'"(?P<text>(?:[^"]|"")*)"|<(?P<flag>\w+)>|(?<!\S)(?P<number>[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?!\S)|![^\n]*'
)
BYTE_ORDER_MARKS = {codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF16_LE: "utf-16"}


def read_textgrid(path):
    """
    Args:
        path: TextGrid file in Praat's long or short text format, UTF-8 or UTF-16.

    Returns:
        `list` of the interval tiers, in order: (name, intervals). Each interval is (start, end, text, line): start and
        end in seconds, and the line of the file that has the start.

    Raises:
        ValueError: naming file and line, if the file is not valid.
    """
    content = path.read_bytes()
    try:
        text = content.decode(BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a TextGrid in UTF-8 or UTF-16 ({error})") from error
    tokens = _Tokens(path, text)
    if [tokens.next("text"), tokens.next("text")] != ["ooTextFile", "TextGrid"]:
        raise ValueError(f"{path}: not a TextGrid in one of Praat's text formats")
    tokens.next("number"), tokens.next("number")
    num_tiers = tokens.next_count() if tokens.next("flag") == "exists" else 0
    tiers = []
    for _ in range(num_tiers):
        kind, name = tokens.next("text"), tokens.next("text")
        tokens.next("number"), tokens.next("number")
        size = tokens.next_count()
        if kind == "IntervalTier":
            tiers.append((name, [tokens.next_interval() for _ in range(size)]))
        else:  # points in time
            for _ in range(size):
                tokens.next("number"), tokens.next("text")
    return tiers


class _Tokens:
    def __init__(self, path, text):
        self.path = path
        self.found = (match for match in TOKEN.finditer(text) if match.lastgroup)
        self.text, self.line, self.counted = text, 1, 0  # the last token's line, and where it begins in the text

    def next(self, kind):
        match = next(self.found, None)
        end = len(self.text) if match is None else match.start()
        self.line += self.text.count("\n", self.counted, end)
        self.counted = end
        if match is None or match.lastgroup != kind:
            got = "the end of the file" if match is None else match[0]
            raise ValueError(f"{self.path}, row {self.line}: got {got}; expected a {kind} at this place in a TextGrid")
        return match[kind].replace('""', '"')

    def next_count(self):
        number = self.next("number")
        if not number.isdecimal():
            raise ValueError(f"{self.path}, row {self.line}: got {number}; expected a count")
        return int(number)

    def next_interval(self):
        start, line = float(self.next("number")), self.line
        return start, float(self.next("number")), self.next("text"), line


def write_textgrid(file, tiers, seconds):
    """
    Args:
        file: text file, in UTF-8.
        tiers: `list` of (name, intervals), each interval (start, end, text), in seconds. Intervals of a tier must be in
            order and not overlap. Gaps between them become intervals without text.
        seconds: duration of the recording.
    """
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {seconds!r}"]
    lines += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for number, (name, intervals) in enumerate(tiers, start=1):
        whole = _without_gaps(intervals, seconds)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f"        name = {_quoted(name)}"]
        lines += ["        xmin = 0", f"        xmax = {seconds!r}", f"        intervals: size = {len(whole)}"]
        for place, (start, end, text) in enumerate(whole, start=1):
            lines += [f"        intervals [{place}]:", f"            xmin = {start!r}", f"            xmax = {end!r}"]
            lines.append(f"            text = {_quoted(text)}")
    file.write("\n".join(lines) + "\n")


def _without_gaps(intervals, seconds):
    bounds = [(0.0, 0.0, ""), *intervals, (seconds, seconds, "")]
    whole = []
    for (_, end, _), following in pairwise(bounds):
        if end < following[0]:
            whole.append((end, following[0], ""))
        whole.append(following)
    return whole[:-1]


def _quoted(text):
    return '"' + text.replace('"', '""') + '"'
