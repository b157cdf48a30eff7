"""Describes the machine, and measures its matrix product and copy rates, the limits that benchmarks compare with."""

import platform
import threading
import time
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe():
    """The hardware in one line."""
    if DEVICE.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else platform.machine()
        hardware = f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{hardware}, torch {torch.__version__}"


def seconds_of(function, runs=1):
    """Shortest of several runs, in seconds."""
    times = []
    for _ in range(runs):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(dtype, size=2048):
    """Floating-point operations per second of a large matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / seconds_of(lambda: a @ b, runs=5)


def copy_rate(megabytes=256):
    """Bytes per second, read and written, of a large copy."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), runs=5)


def anonymous_memory(process="self"):
    """Anonymous memory of a process in bytes (RssAnon), without pages of mapped files."""
    (line,) = (line for line in _lines(f"/proc/{process}/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Context manager that records the peak of this process's anonymous memory."""

    def __enter__(self):
        self.peak = anonymous_memory()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while not self.is_over.wait(0.005):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def least_cpu_seconds(function, rounds):
    """The shortest CPU time of several rounds, in seconds, and the function's result."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        result = function()
        times.append(time.process_time() - started)
    return min(times), result
