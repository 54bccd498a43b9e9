"""Take the next item of a sequence while the current one is in use.

read_ahead      another thread takes the next item: for items that the CPU prepares
one_ahead       this thread takes the next item first: for items that a GPU computes
"""

from threading import Thread

END = object()  # in place of an item, after the last one
MOMENT = 1.0  # seconds that `read_ahead` waits at its end for an item that nobody wants any more


def read_ahead(items):
    """Yield the items in order. Another thread takes each while the caller works on the one before.

    At most two items exist at once. What `items` raises is raised here, in place of its item.
    """
    iterator = iter(items)
    coming = Coming(iterator)
    try:
        while (item := coming.result()) is not END:
            coming = Coming(iterator)
            yield item
    finally:
        # The thread may wait for a pipe for ever, so it does not keep the process from ending. But
        # Python must not end while it is in a library.
        coming.join(MOMENT)


class Coming(Thread):
    """A thread that takes one item of an iterator."""

    def __init__(self, iterator):
        super().__init__(name="read_ahead", daemon=True)  # which model/processor.py knows
        self.iterator = iterator
        self.item = END
        self.error = None
        self.start()

    def run(self):
        try:
            self.item = next(self.iterator, END)
        except BaseException as error:  # or an item would be missing, and nobody would know
            self.error = error

    def result(self):
        """Return the item, or END. Wait for it, and raise what the iterator has raised."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.item


def one_ahead(items):
    """Yield the items in order, but take each of them before the one before is yielded.

    If an item is a result on a GPU, the GPU then has the next one to compute while the caller waits
    for this one.
    """
    iterator = iter(items)
    current = next(iterator, END)
    while current is not END:
        following = next(iterator, END)
        yield current
        current = following
