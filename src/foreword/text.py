"""Text as its tokens come: whole characters only, and nothing that a stop string could still take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextSoFar"]


class TextSoFar:
    """The text of y, piece by piece.

    Args:
        decode: the text of tokens.
        stop: strings before which the text ends.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._tokens: list[int] = []
        self._text = ""
        self._shown = 0
        # decoded again with each new token, since a token's text depends on those before; of the first the text is known
        self._window: list[int] = []
        self._known = 0

    def add(self, token: int) -> str:
        """One token more. Returns the text that is certain by now."""
        self._tokens.append(token)
        known = self._decode(self._window[: self._known])
        now = self._decode([*self._window, token])
        if now == known:
            # a special token, which has no text and no say in that of the next; before any text it may be a space, which has
            if not self._text:
                self._window.append(token)
            return ""
        self._window.append(token)
        upto = len(self._window)
        # a lone byte of a longer character decodes to U+FFFD until the rest is there: of four bytes at the most
        if now.endswith("\ufffd"):
            upto -= 4
            if upto <= self._known:
                return ""
            certain, rest = self._decode(self._window[:upto]), self._decode(self._window[upto:])
            if now != certain + rest:
                return ""
            now = certain
        start = len(self._text) - max(map(len, self._stop), default=0)
        self._text += now[len(known) :]
        self._window = self._window[self._known :]
        self._known = upto - self._known
        self._cut(max(start, 0))
        held = 0 if self.stopped else max(map(self._begun, self._stop), default=0)
        return self._show(len(self._text) - held)

    def end(self) -> str:
        """No more tokens come. Returns the rest of the text."""
        text = self._decode(self._tokens)
        if not self.stopped and text.startswith(self._text):
            start = len(self._text) - max(map(len, self._stop), default=0)
            self._text = text
            self._cut(max(start, 0))
        return self._show(len(self._text))

    def _begun(self, string: str) -> int:
        """Characters at the text's end that are the string's beginning."""
        place = max(len(self._text) - len(string) + 1, 0)
        while (place := self._text.find(string[0], place)) >= 0:
            if string.startswith(self._text[place:]):
                return len(self._text) - place
            place += 1
        return 0

    def _cut(self, start: int) -> None:
        """End the text before the first stop string, none of which begins before `start`."""
        places = [place for place in (self._text.find(string, start) for string in self._stop) if place >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
