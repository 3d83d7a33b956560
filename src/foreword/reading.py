"""Text as people give it: UTF-8, or an error that says where it is not."""

from __future__ import annotations

from os import PathLike

from foreword.errors import DataError

__all__ = ["text_of"]


def text_of(data: bytes, where: str | PathLike[str]) -> str:
    """The text of a file, or of one of its lines, without a byte order mark.

    Args:
        data: its bytes.
        where: what an error calls it.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data.count(b"\n", 0, error.start)
        line = f", in line {before + 1}," if before else ""
        raise DataError(
            f"{where}: expected UTF-8; byte {error.start} (0x{data[error.start]:02x}){line} is not: save it as UTF-8, e.g. with "
            "iconv -t UTF-8"
        ) from None
