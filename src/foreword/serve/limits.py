"""What is let in: so many texts at once altogether, and for each key so many at once and so many tokens a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from foreword.errors import ForewordError, SettingsError
from foreword.serve.access import Key

__all__ = ["Limits", "TooManyError"]

MAX_WAIT = 60


class TooManyError(ForewordError):
    """Too much was asked for at once.

    Attributes:
        retry_after: seconds after which to try again.
        what: `requests` or `tokens`.
    """

    def __init__(self, message: str, retry_after: float, what: str = "requests"):
        super().__init__(message)
        self.retry_after = min(max(1, math.ceil(retry_after)), MAX_WAIT)
        self.what = what


@dataclass
class _Account:
    """What a key has under way, and the tokens that it has left, which may be fewer than none."""

    under_way: int = 0
    tokens: float = 0.0
    since: float = 0.0


class Limits:
    """Counts texts and tokens; used on one event loop.

    Args:
        max_texts: that are under way at once, running and waiting.
        clock: seconds.

    Attributes:
        under_way: texts.
    """

    def __init__(self, max_texts: int, clock: Callable[[], float] = time.monotonic):
        self.max_texts = max_texts
        self.under_way = 0
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._seconds = 1.0

    @contextmanager
    def entered(self, key: Key, texts: int, tokens: int) -> Iterator[Callable[[int], None]]:
        """Let texts in for the time of a `with` block.

        Args:
            texts: how many.
            tokens: of x in all.

        Yields:
            what is to be called with the number of tokens of y, as they come.

        Raises:
            TooManyError: more than there is room for, or the key may have, by now.
            SettingsError: more than the key may ever have at once.
        """
        account = self._account(key)
        if self.under_way + texts > self.max_texts:
            raise TooManyError(
                f"expected at most {self.max_texts} texts under way; there are {self.under_way}, and {texts} more were "
                "asked for: try again later",
                self._seconds,
            )
        if key.concurrency is not None and texts > key.concurrency:
            raise SettingsError(f"this key may have {key.concurrency} texts under way; {texts} were asked for at once")
        if key.concurrency is not None and account.under_way + texts > key.concurrency:
            raise TooManyError(
                f"this key may have {key.concurrency} texts under way; it has {account.under_way}, and {texts} more were "
                "asked for: try again when one has ended",
                self._seconds,
            )
        if key.tokens_per_minute is not None and account.tokens < min(tokens, key.tokens_per_minute):
            lacking = min(tokens, key.tokens_per_minute) - account.tokens
            raise TooManyError(
                f"this key may have {key.tokens_per_minute} tokens a minute, which are used up: try again later",
                lacking * 60 / key.tokens_per_minute,
                "tokens",
            )

        def spend(more: int) -> None:
            # a limit that comes later begins with what comes later
            account.tokens -= more if key.tokens_per_minute is not None else 0

        began = self._clock()
        self.under_way += texts
        account.under_way += texts
        spend(tokens)
        try:
            yield spend
        finally:
            self.under_way -= texts
            account.under_way -= texts
            self._seconds += (self._clock() - began - self._seconds) / 8

    def _account(self, key: Key) -> _Account:
        """With the tokens that have come by now."""
        now, full = self._clock(), float(key.tokens_per_minute or 0)
        if key.id not in self._accounts:
            self._accounts[key.id] = _Account(tokens=full, since=now)
        account = self._accounts[key.id]
        account.tokens = min(full, account.tokens + (now - account.since) * full / 60)
        account.since = now
        return account
