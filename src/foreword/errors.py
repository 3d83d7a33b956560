"""What can go wrong, as a tree.

Every exception here is the user's to mend: its message is one line that says what was expected, what came, and what
to do. The command line prints that line and exits with 2. Our own mistakes are assertions.

    ForewordError (ValueError)
    ├── BaseLoadError        no model there, or one of a family that is not supported
    ├── PrefixFileError      not a prefix file: foreign, truncated, wrong shapes, not finite
    │   └── WrongBaseError   a prefix of another base
    ├── DataError            records or rows that cannot be used
    │   └── TooLongError     prefix and tokens exceed the base's context
    ├── SettingsError        a setting out of its range, or two that exclude each other
    ├── TrainingError        training cannot go on: the loss is not finite, the checkpoint is another run's
    ├── StoreError           no store there, or a name that cannot be one
    │   └── NoSuchPrefixError   no prefix of that name, or no such version of it
    ├── HubError             the hub cannot be reached, or refuses
    └── MissingExtraError    an optional package is not installed
"""

from __future__ import annotations

__all__ = [
    "BaseLoadError",
    "DataError",
    "ForewordError",
    "HubError",
    "MissingExtraError",
    "NoSuchPrefixError",
    "PrefixFileError",
    "SettingsError",
    "StoreError",
    "TooLongError",
    "TrainingError",
    "WrongBaseError",
]


def one_line(what: object, most: int = 200) -> str:
    """On one line, and no longer than a message bears: whoever raised it, or wrote the file, chose what it says."""
    return " ".join(str(what).split())[:most] or type(what).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice: torch has a kind of its own for a GPU, and none for a CPU."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "you tried to allocate" in str(error)


class ForewordError(ValueError):
    """Something the user can mend; the message is one line."""


class BaseLoadError(ForewordError):
    """No model at that name, or one that foreword cannot attach a prefix to."""


class PrefixFileError(ForewordError):
    """A file that is not a usable prefix."""


class WrongBaseError(PrefixFileError):
    """A prefix that was trained on another base."""


class DataError(ForewordError):
    """Records or rows that cannot be used."""


class TooLongError(DataError):
    """Virtual tokens and tokens together exceed the base's context."""


class SettingsError(ForewordError):
    """A setting out of its range, or two that exclude each other."""


class TrainingError(ForewordError):
    """Training cannot start or go on."""


class StoreError(ForewordError):
    """No store there, or a name that cannot be one."""


class NoSuchPrefixError(StoreError):
    """No prefix of that name, or no such version of it."""


class HubError(ForewordError):
    """The hub cannot be reached, has no such thing, or refuses."""


class MissingExtraError(ForewordError):
    """An optional package is not installed: `MissingExtraError("eval", "sacrebleu")`."""

    def __init__(self, extra: str, package: str):
        super().__init__(f"this needs the package {package!r}, which is not installed: pip install 'foreword[{extra}]'")
        self.extra, self.package = extra, package

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.extra, self.package)  # so that it comes out of a process pool
