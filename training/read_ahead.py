"""Reads ahead on threads: audio is decoded, and batches are read, while the device computes."""

from threading import Condition

from ..threads_emoshare import single_threads


class ReadAhead:
    """
    Calls a function on items, on threads that run ahead of the consumer of the results.

    Args:
        function: function of an item.
        items: list of items.
        cost: function that returns the cost of buffering a result, in any unit.
        limit: maximum total cost of buffered results; at or above it, no further item is begun.
        num_threads: number of threads.

    Yields:
        The results, in the order of the items. An exception is raised in place of its result.
    """

    def __init__(self, function, items, cost, limit, num_threads):
        self.function, self.items, self.cost, self.limit = function, items, cost, limit
        self.num_threads = num_threads
        self.changed = Condition()
        self.begun = 0  # number of items that threads have taken
        self.waiting = {}  # (result, exception, cost), by place
        self.room = 0  # total cost of waiting results
        self.is_over = False

    def __iter__(self):
        with single_threads(self.num_threads) as pool:
            for _ in range(self.num_threads):
                pool.submit(self._work)
            try:
                for place in range(len(self.items)):
                    with self.changed:
                        self.changed.wait_for(lambda: place in self.waiting)  # noqa: B023
                        result, error, room = self.waiting.pop(place)
                        self.room -= room
                        self.changed.notify_all()
                    if error is not None:
                        raise error
                    yield result
            finally:
                with self.changed:
                    self.is_over = True
                    self.changed.notify_all()

    def _work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_over or self.room < self.limit)
                place = self.begun
                if self.is_over or place == len(self.items):
                    return
                self.begun += 1
            try:
                result = self.function(self.items[place])
                outcome = result, None, self.cost(result)
            except Exception as error:  # noqa: BLE001  (raised again while iterating)
                outcome = None, error, 0
            with self.changed:
                self.waiting[place] = outcome
                self.room += outcome[2]
                self.changed.notify_all()
