import threading
import time

import pytest

from emoshare.training.read_ahead import ReadAhead


def slowly(item):
    time.sleep(0.002 * (item % 3))
    return item


@pytest.mark.parametrize("num_threads", [1, 3])
def test_results_come_in_order_whichever_thread_is_first(num_threads):
    ahead = ReadAhead(slowly, list(range(20)), cost=lambda item: 1, limit=5, num_threads=num_threads)
    assert list(ahead) == list(range(20))


def test_what_waits_has_a_limit():
    """Three results of 10 fill the limit of 30; each of the two threads may have begun one more before."""
    read = []
    results = iter(ReadAhead(lambda item: read.append(item) or item, list(range(50)), lambda item: 10, 30, 2))
    for number in range(3):
        assert next(results) == number
        deadline = time.monotonic() + 5
        while len(read) < number + 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert number + 4 <= len(read) <= number + 5
    results.close()


def test_one_result_may_be_larger_than_the_limit():
    assert list(ReadAhead(slowly, list(range(7)), cost=lambda item: 100, limit=1, num_threads=2)) == list(range(7))


def test_an_error_comes_in_its_place():
    def fail(item):
        if item >= 2:
            raise ValueError(f"item {item}")
        return item

    results = iter(ReadAhead(fail, list(range(9)), cost=lambda item: 1, limit=9, num_threads=3))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)


def test_who_leaves_early_leaves_no_threads():
    before = threading.active_count()
    for result in ReadAhead(slowly, list(range(1000)), cost=lambda item: 1, limit=4, num_threads=2):
        if result == 3:
            break
    assert threading.active_count() == before
