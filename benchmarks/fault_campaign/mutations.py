"""Ways to damage files: bytes, text, and structures of JSON and YAML. Each takes a `random.Random`."""

import copy
import json

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1]
HEADER_BYTES = 64
WORDS = [
    *["nan", "-nan", "inf", "-1", "1e400", "-0.0", "0x1", "1_0", "٣", "1,5", "9" * 400, "null", "[]", "{}", "filename"],
    *[
        "",
        " ",
        '"',
        '""',
        "'",
        ",",
        ";",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\ufeff",
        "\x00",
        "?",
        "../x",
        "/",
        "~",
        "é",
        "audio",
    ],
    *["\U0001f600", "A" * 5000, "&a", "*a", "!!python/object:x", "|", "- ", ": ", "#", "%"],
]
VALUES = [
    *[None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e-300, 1e300],
    *[float("nan"), float("inf"), "", "x", "0", "-1", "é\u0000", "A" * 5000, "acoustic", "../../x"],
    *[[], [0], [1, 2], [-1], [[]], [None], ["a", "a"], {}, {"a": 1}, {"0": "a", "2": "b"}, {"model_type": "bert"}],
]


def damaged_bytes(data, rng, others):
    """`data` with one to four changes: flipped bits, extreme numbers, parts removed, repeated, inserted or foreign."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        rng.choice(BYTE_CHANGES)(data, rng, others)
    return bytes(data)


def cut_short(data, rng):
    """The beginning of `data`: 5 to 95 % of it."""
    return data[: round(len(data) * rng.uniform(0.05, 0.95))]


def damaged_text(data, rng, others):
    """UTF-8 text with words, fields and lines replaced, removed, repeated and moved; sometimes with damaged bytes."""
    if rng.random() < 0.2:
        return damaged_bytes(data, rng, others)
    lines = data.decode("utf-8").split("\n")
    for _ in range(rng.randint(1, 3)):
        change, row = rng.randrange(6), rng.randrange(len(lines))
        separator = rng.choice([",", ",", ":", " "])
        fields = lines[row].split(separator)
        place = rng.randrange(len(fields))
        if change <= 1:
            fields[place] = rng.choice(WORDS)
        elif change == 2:
            fields.insert(place, rng.choice([rng.choice(WORDS), fields[place]]))
        elif change == 3 and len(fields) > 1:
            del fields[place]
        lines[row] = separator.join(fields)
        if change == 4:
            lines.insert(rng.randrange(len(lines) + 1), lines[row])
        elif change == 5 and len(lines) > 1:
            del lines[row]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damaged_structure(value, rng):
    """A JSON or YAML structure with one to three values replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        change = rng.randrange(6)
        if change <= 3:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif change == 4:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(["", "x", f"{key}s", "model_type", "auto_map"])] = holder.pop(key)
    return value


def damaged_json(data, rng, others):
    """JSON with a damaged structure or damaged text."""
    if rng.random() < 0.2:
        return damaged_text(data, rng, others)
    return json.dumps(damaged_structure(json.loads(data), rng)).encode()


def _places(value):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _position(data, rng):
    """A random position; half of them are in the header."""
    end = min(len(data), HEADER_BYTES) if rng.random() < 0.5 else len(data)
    return rng.randrange(end) if end else 0


def _flip(data, rng, others):
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[_position(data, rng)] ^= 1 << rng.randrange(8)


def _extreme(data, rng, others):
    size = rng.choice([1, 2, 4, 8])
    number = (rng.choice(EXTREMES) & ((1 << 8 * size) - 1)).to_bytes(size, rng.choice(["little", "big"]))
    start = _position(data, rng)
    data[start : start + size] = number


def _remove(data, rng, others):
    start = _position(data, rng)
    del data[start : start + rng.choice([1, 2, 4, 16, 256, len(data)])]


def _repeat(data, rng, others):
    start = _position(data, rng)
    data[start:start] = data[start : start + rng.choice([1, 4, 64, 1024])]


def _insert(data, rng, others):
    start = _position(data, rng)
    data[start:start] = rng.randbytes(rng.choice([1, 2, 4, 64]))


def _splice(data, rng, others):
    other = rng.choice(others)
    start = _position(other, rng)
    piece = other[start : start + rng.choice([4, 16, 64, 1024])]
    place = _position(data, rng)
    data[place : place + rng.choice([0, len(piece)])] = piece


def _zero(data, rng, others):
    start = _position(data, rng)
    size = len(data[start : start + rng.choice([2, 16, 256])])
    data[start : start + size] = bytes(size)


BYTE_CHANGES = (_flip, _flip, _extreme, _extreme, _remove, _repeat, _insert, _splice, _zero)
