"""Runs many small computations side by side on the cores of a CPU, on one thread each."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch


def side_by_side(tasks, num_threads=None):
    """
    Runs functions on threads that take them from a queue, with one intra-op thread each.

    A head consists of hundreds of small operators, above all an LSTM's steps. Dividing each of them among intra-op
    threads, which wait for each other after every operator, is up to 30 times slower when another process needs a core.
    Whole heads on single threads never wait for each other.

    Args:
        tasks: functions without arguments, which compute on the CPU.
        num_threads: number of threads, by default `torch.get_num_threads()`.

    Returns:
        `list`: what the functions return, in order. An exception in one of them is raised here.
    """
    num_threads = min(num_threads or torch.get_num_threads(), len(tasks))
    if num_threads <= 1:
        return [task() for task in tasks]
    return list(_pool(num_threads).map(_call, tasks))


def _call(task):
    return task()


def _use_one_thread():
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread reads the default once, when it first asks; later changes do not reach it


def single_threads(num_threads):
    """A `ThreadPoolExecutor` whose threads use one intra-op thread each; all of them have started."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "emoshare", initializer=_use_one_thread)
    # Each thread sets its own number, and thereby the default for threads that start later. So all start now, each with
    # a task that waits for the others, and then the default is restored.
    all_started = Barrier(num_threads)
    list(pool.map(_call, [all_started.wait] * num_threads))
    torch.set_num_threads(before)
    return pool


_pool = cache(single_threads)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads
