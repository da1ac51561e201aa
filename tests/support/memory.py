"""How much memory a call needs, without the pages of files, which the kernel may drop."""

import threading
from pathlib import Path

import pytest

_STATUS = Path("/proc/self/status")

needs_proc = pytest.mark.skipif(not _STATUS.exists(), reason="memory is read from /proc")


def private_bytes():
    """Bytes of this process that lie in memory and in no file."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def growth(function, *arguments):
    """What the function returns, and the greatest number of private bytes in addition."""
    before, most, has_ended = private_bytes(), [0], threading.Event()

    def watch():
        while not has_ended.wait(0.002):
            most[0] = max(most[0], private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        answer = function(*arguments)
        most[0] = max(most[0], private_bytes())
    finally:
        has_ended.set()
        thread.join()
    return answer, most[0] - before
