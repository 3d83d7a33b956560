"""Threads that wait for the store: apart from those that frame x, since a store may hang, and nobody else is to wait then."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple, Unpack

__all__ = ["StoreThreads", "leave_hung_threads"]

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")

THREADS = 16

log = logging.getLogger(__name__)


class StoreThreads:
    """Runs what reads and writes a store.

    Args:
        seconds: for one call, in which it waits for a thread, too. None: whoever calls has a limit of their own.
    """

    def __init__(self, seconds: float | None = None):
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(THREADS, "foreword-store")

    async def run(self, work: Callable[[Unpack[_Arguments]], _T], *arguments: *_Arguments) -> _T:
        """What `work` returns or raises. Raises `OSError` where it takes too long; it may end all the same."""
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        except TimeoutError:
            # not as a TimeoutError, which is said of texts
            raise OSError(f"the store did not answer within {self._seconds:g} s") from None

    def close(self) -> None:
        """Begin nothing more, and wait for nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def leave_hung_threads(seconds: float, code: int) -> None:
    """End the process at once where threads don't end within so many seconds: Python would wait for them for ever."""
    end = time.monotonic() + seconds
    others = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    for one in others:
        one.join(max(0.0, end - time.monotonic()))
    hung = sum(one.is_alive() for one in others)
    if hung:
        log.warning("%d threads are left that wait for the store", hung)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
