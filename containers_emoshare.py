"""Compares what a file's container promises with what the file holds, without decoding it."""

import io
import re
import zlib
from dataclasses import dataclass

# Sizes of at least this mean "unknown": a writer that writes to a pipe cannot return to the header. FFmpeg writes
# 0xFFFFFFFF, arecord 0x80000000, GStreamer 0x7FFF0000, sox 0x7FFFF000 and for AIFF 0x7F000000 bytes.
UNKNOWN_SIZE = {4: 0x7F000000, 8: 1 << 62}  # by the bytes of the size field
MAX_CHUNKS = 10_000  # how many chunks are searched for the samples
MAX_JUNK = 1 << 16  # how many bytes after a frame of an MP3 are searched for the next one


@dataclass(frozen=True)
class Contents:
    """
    Args:
        fault (`str`, *optional*): what is missing from the file; `None` if nothing is, as far as headers show.
        head (`bytes`), skipped (`int`): the file must be decoded as if its first `skipped` bytes were `head`, which
            states what the file really holds.
        following (`tuple[int]`): positions at which further streams begin. Each is decoded separately, and appended.
        min_samples (`int`): the least number of samples that decoding must give, at the file's own rate.
    """

    fault: str | None = None
    head: bytes = b""
    skipped: int = 0
    following: tuple = ()
    min_samples: int = 0


def contents(file):
    """
    Compares what a container promises with what the file holds.

    | Container                  | What is compared                                                                    |
    |----------------------------|-------------------------------------------------------------------------------------|
    | WAV, RF64, W64, AIFF, SVX, | the size of the samples. A placeholder, or 0 with samples behind it (the writer was |
    | AU, CAF                    | cut off), promises nothing: what is there is taken for all. The size of the whole   |
    |                            | file, which some writers put there, promises nothing either                         |
    | NIST SPHERE                | the number of samples, if they are not compressed                                   |
    | Ogg                        | each page's checksum, and the mark of the last page                                 |
    | MP3                        | the number of frames (Xing, Info and VBRI headers), and the end of the last frame   |

    An MP3 without such a header that was cut between two frames, and a file with a placeholder, show nothing. Nor do
    other containers. Decoding a FLAC file that was cut fails.

    Args:
        file: binary file object that can seek.

    Returns:
        `Contents`.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(12)
    if start[:4] in CHUNK_FORMATS:
        return _chunked(file, size, CHUNK_FORMATS[start[:4]])
    if start[:4] in (b".snd", b"dns."):
        return _au(file, size, "big" if start[:4] == b".snd" else "little")
    if start[:7] == b"NIST_1A":
        return _sphere(file, size)
    if start[:4] == b"OggS":
        return _ogg(file, size)
    if start[:3] == b"ID3" or _mpeg_frame(start[:4]) is not None:
        return _mp3(file, size)
    return Contents()


class Patched(io.RawIOBase):
    """
    A read-only file whose first `skipped` bytes are replaced by `head`. Negative positions become 0: libsndfile tries
    them in damaged files, and would print the error that a file object raises.
    """

    def __init__(self, file, head=b"", skipped=0):
        self.file, self.head, self.skipped = file, head, skipped
        self.position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        if whence == io.SEEK_CUR:
            offset += self.position
        elif whence == io.SEEK_END:
            offset += self.file.seek(0, io.SEEK_END) - self.skipped + len(self.head)
        self.position = max(offset, 0)
        return self.position

    def tell(self):
        return self.position

    def readinto(self, buffer):
        taken = self.head[self.position : self.position + len(buffer)]
        if len(taken) < len(buffer):
            self.file.seek(self.position + len(taken) - len(self.head) + self.skipped)
            taken += self.file.read(len(buffer) - len(taken))
        buffer[: len(taken)] = taken
        self.position += len(taken)
        return len(taken)


# Containers made of chunks, each with an identifier, a size, and that many bytes


@dataclass(frozen=True)
class ChunkFormat:
    first: int  # position of the first chunk
    byteorder: str = "little"
    id_bytes: int = 4
    size_bytes: int = 4
    alignment: int = 2
    size_of_all: bool = False  # whether sizes include the identifier and the size field


CHUNK_FORMATS = {
    b"RIFF": ChunkFormat(12),
    b"RIFX": ChunkFormat(12, "big"),
    b"RF64": ChunkFormat(12),
    b"BW64": ChunkFormat(12),
    b"riff": ChunkFormat(40, id_bytes=16, size_bytes=8, alignment=8, size_of_all=True),  # W64
    b"FORM": ChunkFormat(12, "big"),  # AIFF and SVX
    b"caff": ChunkFormat(8, "big", size_bytes=8, alignment=1),
}
SAMPLES = (b"data", b"SSND", b"BODY")


def _chunked(file, size, form):
    large = None  # RF64: position of the 64-bit size of the samples
    for name, field, start, length in _chunks(file, size, form, form.first):
        if name == b"ds64" and length >= 16:
            large = start + 8
        elif name[:4] in SAMPLES:
            size_bytes = form.size_bytes
            if large is not None and length == 0xFFFFFFFF:
                file.seek(large)
                field, size_bytes, length = large, 8, int.from_bytes(file.read(8), "little")
            counted = start - (field - form.id_bytes) if form.size_of_all else 0
            return _compared(file, size, start, length, field, size_bytes, counted, form)
    return Contents()


def _chunks(file, size, form, position):
    """Yields identifier, position of the size field, and position and length of the content of each chunk."""
    header = form.id_bytes + form.size_bytes
    for _ in range(MAX_CHUNKS):
        if position + header > size:
            return
        file.seek(position)
        name = file.read(form.id_bytes)
        length = int.from_bytes(file.read(form.size_bytes), form.byteorder)
        if form.size_of_all:
            length = max(length - header, 0)
        if not re.fullmatch(rb"[ -~\xa9]{4}", name[:4]):
            return
        yield name, position + form.id_bytes, position + header, length
        position += header + length
        position += -position % form.alignment


def _compared(file, size, start, promised, field, size_bytes, counted, form):
    """`start`: position of the samples; `field`: position of their size, which includes `counted` other bytes."""
    present = size - start
    # Before the samples, the SSND chunk of AIFF has 8 bytes, and the data chunk of CAF 4.
    is_unclosed = promised <= (8 if form.byteorder == "big" else 0) and not _are_chunks(
        file, size, form, start + promised
    )
    is_unknown = promised + counted >= UNKNOWN_SIZE[size_bytes] or is_unclosed
    if promised <= present and not is_unclosed:
        return Contents()
    is_whole = is_unknown or promised in (size, size - 8)  # some writers put the size of the whole file there
    fault = None if is_whole else _shortage(promised, present, "bytes of samples")
    file.seek(0)
    head = file.read(start)
    largest = (1 << 8 * size_bytes) - 1
    real = min(present + counted, largest).to_bytes(size_bytes, form.byteorder)
    return Contents(fault, head[:field] + real + head[field + size_bytes :], start)


def _are_chunks(file, size, form, start):
    """Whether nothing but chunks, or nothing at all, follows `start`."""
    end = start
    for _, _, begin, length in _chunks(file, size, form, start):
        end = begin + length
    return end + form.alignment > size >= end


def _shortage(promised, present, unit):
    return f"its header promises {promised:,} {unit}, and {present:,} are there"


def _au(file, size, byteorder):
    file.seek(4)
    start, promised = (int.from_bytes(file.read(4), byteorder) for _ in range(2))
    if not 24 <= start <= size:
        return Contents()
    return _compared(file, size, start, promised, 8, 4, 0, ChunkFormat(start, byteorder, alignment=1))


def _sphere(file, size):
    file.seek(0)
    header = file.read(1024)
    fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", header, re.MULTILINE))
    header_bytes = re.match(rb"NIST_1A\s+(\d{1,9})\s", header)
    numbers = [fields.get(name, b"") for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    is_compressed = b"," in fields.get(b"sample_coding", b"")  # "pcm,embedded-shorten-v2.00"
    if header_bytes is None or is_compressed or not all(number.isdigit() for number in numbers):
        return Contents()
    count, channels, sample_bytes = map(int, numbers)
    present = max(size - int(header_bytes[1]), 0)
    if count * channels * sample_bytes <= present:
        return Contents()
    return Contents(_shortage(count * channels * sample_bytes, present, "bytes of samples"))


# Ogg: pages

REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg(file, size):
    fault, begins = _ogg_streams(file, size)
    return Contents(fault, following=tuple(begins[1:]))


def _ogg_streams(file, size):
    """Returns what is missing, or `None`, and the positions at which consecutive streams begin."""
    position, unfinished, begins = 0, set(), []
    while position < size:
        file.seek(position)
        header = file.read(27)
        if header[:4] != b"OggS"[: len(header)]:
            break
        lengths = file.read(header[26]) if len(header) == 27 else b""
        page_bytes = 27 + len(lengths) + sum(lengths)
        if len(header) < 27 or len(lengths) < header[26] or position + page_bytes > size:
            return f"it ends within a page, at byte {size:,}", begins
        if _ogg_checksum(header[:22] + bytes(4) + header[26:] + lengths + file.read(sum(lengths))) != header[22:26]:
            return f"the page at byte {position:,} is damaged", begins
        flags, serial = header[5], header[14:18]
        if flags & 2:  # a stream begins
            if not unfinished:  # streams may also be interleaved, as those of a video are
                begins.append(position)
            unfinished.add(serial)
        if flags & 4:  # a stream ends
            unfinished.discard(serial)
        position += page_bytes
    if unfinished:
        return f"the page at byte {position:,} is damaged" if position < size else "its last page is missing", begins
    return None, begins


def _ogg_checksum(page):
    """Ogg's CRC-32 is zlib's with the bits of each byte and of the result reversed, and without inversion."""
    crc = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(REVERSED_BITS)


# MP3: frames

KBPS = {  # by version (is it MPEG-1) and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
TRIMMED_FRAMES = 4  # how many frames a decoder may drop at the ends, because an encoder had to add them
MPEG_RATES = (44100, 48000, 32000)  # Hz, of MPEG-1; half of them for MPEG-2, a quarter for MPEG-2.5


@dataclass(frozen=True)
class MpegFrame:
    num_bytes: int
    num_samples: int
    stream: tuple  # what all frames of a file have in common
    side_bytes: int  # number of bytes between the frame's header and a Xing header


def _mpeg_frame(header):
    """The frame whose first four bytes these are, or `None`."""
    if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # version 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    rate_index, kbps_index = header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or kbps_index in (0, 15):
        return None
    rate = MPEG_RATES[rate_index] // {3: 1, 2: 2, 0: 4}[version]
    kbps, padding = KBPS[version == 3, layer][kbps_index - 1], header[2] >> 1 & 1
    num_samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    num_bytes = (12000 * kbps // rate + padding) * 4 if layer == 1 else num_samples * 125 * kbps // rate + padding
    is_mono = header[3] >> 6 == 3
    side_bytes = (17 if is_mono else 32) if version == 3 else (9 if is_mono else 17)
    return MpegFrame(num_bytes, num_samples, (version, layer, rate), side_bytes)


def _mp3(file, size):
    first = _next_frame(file, _after_tags(file), None)
    if first is None:
        return Contents()
    file.seek(first)
    frame = _mpeg_frame(file.read(4))
    promised, promised_bytes = _promised_frames(file, first, frame)
    count, lengths, end, is_cut = _walk(file, size, first, frame)
    min_samples = max(count - 1 - TRIMMED_FRAMES, 0) * frame.num_samples
    if promised is not None:
        found = count - 1  # the frame with the promise holds no audio, although some writers count it
        is_short = found < promised - 1 or (found < promised and end - first < promised_bytes)
        is_whole = not (is_short or is_cut or found > promised + 1)
        return Contents(None if is_whole else _shortage(promised, found, "frames"), min_samples=min_samples)
    fault = "its last frame is cut off" if is_cut else None
    if lengths and max(lengths) > min(lengths) + 1 and frame.stream[1] == 3:
        # libsndfile would guess the number of frames from the size of the first one, and read no further than that.
        return Contents(fault, _xing_frame(file, first, frame, count), first, min_samples=min_samples)
    return Contents(fault, min_samples=min_samples)


def _walk(file, size, position, frame):
    """Returns the number of whole frames, their lengths in bytes, their end, and whether another frame was cut off."""
    count, lengths, end = 0, set(), position
    while position is not None and position < size:
        file.seek(position)
        header = file.read(4)
        current = _mpeg_frame(header)
        if current is not None and current.stream == frame.stream:
            if position + current.num_bytes > size:
                return count, lengths, end, True
            count += 1
            lengths.add(current.num_bytes)
            position = end = position + current.num_bytes
        elif header[0] == 0xFF and len(header) < 4:
            return count, lengths, end, True
        else:
            position = _next_frame(file, position + 1, frame)
    return count, lengths, end, False


def _after_tags(file):
    """Position at which an MP3's ID3v2 tags end."""
    position = 0
    while True:
        file.seek(position)
        tag = file.read(10)
        if tag[:3] != b"ID3" or len(tag) < 10:
            return position
        position += 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))


def _next_frame(file, start, like):
    """Offset of the next frame that a matching frame follows; it matches `like`, if given. `None` if there is none."""
    for first in range(start, start + MAX_JUNK, 1024):
        file.seek(first)
        area = file.read(1024 + 3)
        at = area.find(b"\xff")
        while 0 <= at < 1024:
            frame = _mpeg_frame(area[at : at + 4])
            if frame is not None and (like is None or frame.stream == like.stream):
                file.seek(first + at + frame.num_bytes)
                following = _mpeg_frame(file.read(4))
                if following is not None and following.stream == frame.stream:
                    return first + at
            at = area.find(b"\xff", at + 1)
    return None


def _promised_frames(file, first, frame):
    """
    Returns the number of frames that a Xing, Info or VBRI header in the first frame promises, `None` without such a
    header, and their size in bytes, 0 if the header does not state it.
    """
    file.seek(first)
    content = file.read(frame.num_bytes)
    xing = content[4 + frame.side_bytes :]
    if xing[:4] in (b"Xing", b"Info") and len(xing) >= 16 and xing[7] & 1:
        count, num_bytes = xing[8:12], xing[12:16] if xing[7] & 2 else b""
    elif content[36:40] == b"VBRI" and len(content) >= 54:
        count, num_bytes = content[50:54], content[46:50]
    else:
        return None, 0
    # A writer that could not return to its header left 0.
    return int.from_bytes(count, "big") or None, int.from_bytes(num_bytes, "big")


def _xing_frame(file, first, frame, num_frames):
    """Makes a frame whose Xing header says how many frames follow it."""
    file.seek(first)
    header = bytearray(file.read(4))
    header[1] |= 1  # no checksum
    header[2] = header[2] & 0x0D | 8 << 4  # 64 kbit/s or more, no padding
    content = bytes(header) + bytes(frame.side_bytes) + b"Xing" + (1).to_bytes(4, "big") + num_frames.to_bytes(4, "big")
    return content.ljust(_mpeg_frame(header).num_bytes, b"\0")
