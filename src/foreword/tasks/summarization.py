"""Summarization: a document and its summary a row.

Read from JSONL, or from the hub: columns `document` and `summary` as XSUM has them (Narayan et al. 2018),
`article` and `highlights` as CNN/DailyMail does (Hermann et al. 2015), or `input` and `output` as `prepare`
writes them; `id` and `category` are kept where they are there. Every row is one example.
"""

from __future__ import annotations

from dataclasses import dataclass

from foreword.tasks.records import Collector, Example, Report, text_field
from foreword.tasks.sources import Formats, Source, at, jsonl_rows, read_rows

__all__ = ["FORMATS", "LENGTHS", "Lengths", "read"]

FORMATS: Formats = {".jsonl": jsonl_rows}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Where texts are cut off, at tokenization.

    Args:
        source: tokens of a document.
        target: tokens of a summary, in training.
        generated: tokens of a generated summary, at the most.
    """

    source: int
    target: int
    generated: int


LENGTHS = {
    "xsum": Lengths(source=512, target=60, generated=100),
    "cnn_dm": Lengths(source=512, target=56, generated=142),
}
"""The paper's lengths, by data set: 512 source tokens from its section 5.3, the others from its code, which
has 1024 source tokens for the whole of XSUM and 512 for its news and sports."""


def read(source: Source, *, split: str | None = None, config: str | None = None) -> tuple[list[Example], Report]:
    """Read documents and summaries; see `foreword.tasks.read` for the arguments."""
    found = Collector()
    for row in read_rows(source, FORMATS, split=split, config=config):
        fields = row.fields
        with at(row.where):
            found.add(
                text_field(fields, "document", "article", "input"),
                [text_field(fields, "summary", "highlights", "output")],
                id=row.id if fields.get("id") is None else str(fields["id"]),
                category=text_field(fields, "category") if fields.get("category") is not None else None,
            )
    return found.result(source)
