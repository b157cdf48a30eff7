"""Parts of an extraction, for machines that share only the folder of the stores."""

import re
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from filelock import FileLock, Timeout

SECONDS_BETWEEN_LOOKS = 1
PART_LOCKS = "part-*.lock"  # in a folder of shards


@dataclass(frozen=True)
class Part:
    """
    Args:
        number: number of the part, from 1.
        count: number of all parts.
    """

    number: int
    count: int

    @classmethod
    def named(cls, text):
        """
        The part that a text such as `"3/16"` names.

        Raises:
            ValueError: if it is not the name of a part.
        """
        numbers = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        number, count = map(int, numbers.groups()) if numbers else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(f"--part: got {text!r}; expected K/N, with K from 1 to N, such as 3/16")
        return cls(number, count)

    def of(self, everything):
        """The elements of a sequence that belong to this part; each belongs to one part."""
        return everything[self.number - 1 :: self.count]

    def __str__(self):
        return f"{self.number}/{self.count}"


@contextmanager
def extraction_lock(store, unfinished, part, cut, prepare):
    """
    Prevents that the same features are extracted to a store twice at the same time. Parts of one division of the clips
    have no clip in common, and may run at the same time. A run without parts, or a part of another division, waits for
    parts that have begun; parts that have not begun wait for it.

    Args:
        store (`Path`): the store.
        unfinished (`Path`): the folder of its shards until the store is complete.
        part: `Part`; `None` for a run that extracts everything that is missing.
        cut: text without spaces that describes, with the number of parts, how the clips are divided.
        prepare: function without arguments that makes `unfinished`; called while no part can begin.
    """
    whole = FileLock(f"{store}.lock")
    if part is None:
        with whole:
            for of_part in sorted(unfinished.glob(PART_LOCKS)):
                with FileLock(of_part):  # waits while the part is at work
                    pass
            prepare()
            yield
        return
    division = f"-of-{part.count}-{cut}.lock"
    own = FileLock(unfinished / f"part-{part.number}{division}")
    has_said = False
    while not own.is_locked:
        with whole:
            others = [name for name in parts_at_work(unfinished) if not name.endswith(division)]
            if not others:
                prepare()
                if not unfinished.is_dir():  # the store is whole by now
                    break
                with suppress(Timeout):  # another process extracts this part
                    own.acquire(timeout=0)
        if others and not has_said:
            print(f"{store}: part {part} waits for parts that divide the clips in another way: {', '.join(others)}")
            has_said = True
        if not own.is_locked:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        yield
    finally:
        own.release()


def parts_at_work(unfinished):
    """The names of the locks that parts hold in a folder of shards. Must be called while no part can begin."""
    names = []
    for path in sorted(unfinished.glob(PART_LOCKS)):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            names.append(path.name)
        else:
            lock.release()
    return names
