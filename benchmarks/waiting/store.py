"""
How long it takes to open a feature store, in total and per window.

    python benchmarks/waiting/store.py [WINDOWS]

A store of 100,000 windows of realistic lengths, whose features are one value wide. The peer is how earlier versions
opened stores: one Arrow table of all shards, with a chunk for each window. "Without an index" is a store written by an
earlier version. Each is measured in a process of its own. Memory is peak anonymous memory; maps are memory maps of the
store's files.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the other benchmarks
import numpy as np
import pyarrow as pa
from fabricated_store import FabricatedCorpus, fabricate
from machine import PeakMemory, anonymous_memory, describe

from emoshare.training.store import INDEX, FrameFeatureStore, is_whole

WINDOWS = 100_000


def main(windows):
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        store = fabricate(Path(folder), windows)
        rows = {name: in_a_process(name, store, windows) for name in ("peer", "index")}
        (store / INDEX).unlink()
        rows["without an index"] = in_a_process("index", store, windows)
    print(f"| {windows} windows | s | microseconds a window | bytes of memory a window | maps |\n|---|---|---|---|---|")
    for name, (seconds, memory, maps) in rows.items():
        print(f"| {name} | {seconds:.2f} | {seconds / windows * 1e6:.1f} | {memory / windows:.0f} | {maps} |")
    print(f"{rows['peer'][0] / rows['index'][0]:.0f} times as fast as the peer")


def in_a_process(name, store, windows):
    command = [sys.executable, __file__, name, str(store), str(windows)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(name, store, windows):
    corpus, before = FabricatedCorpus(windows), anonymous_memory()
    started = time.perf_counter()
    with PeakMemory() as memory:
        opened = tables_of(store) if name == "peer" else (is_whole(store), FrameFeatureStore(store, corpus, "train"))
    seconds = time.perf_counter() - started
    maps = Path("/proc/self/maps").read_text().count(str(store))
    del opened
    print(json.dumps([seconds, memory.peak - before, maps]))


def tables_of(store):
    shards = sorted(store.glob("shard-*.arrow"))
    table = pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(shard))).read_all() for shard in shards)
    rows = np.lexsort([table.column("start").to_numpy(), table.column("clip").to_numpy()])
    return table, rows, np.array([shape[-2].as_py() for shape in table.column("shape")])[rows]


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("peer", "index"):
        measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else WINDOWS)
