"""What every reader makes: inputs with their references, and an account of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foreword.errors import DataError

__all__ = ["Collector", "Example", "Report", "records_field", "text_field", "training_rows"]


@dataclass(frozen=True)
class Example:
    """One input and every reference for it.

    Args:
        input: the linearized input, without the white space that a framing puts around it.
        references: the texts written for it, in the order of the source; at least one.
        category: what per-category figures are grouped by (WebNLG's topic, DART's source), or None.
        id: where it comes from: the file's name and the line, entry or row.
    """

    input: str
    references: tuple[str, ...]
    category: str | None
    id: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a reader kept, and what it dropped and why. `str()` of it is one line for people.

    Args:
        kept: number of examples.
        references: number of references of those examples.
        dropped: for each reason, the number of things dropped. A reason is a singular noun phrase.
    """

    kept: int
    references: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        dropped = ", ".join(f"{count:,} × {reason}" for reason, count in self.dropped.items())
        return f"kept {self.kept:,} inputs with {self.references:,} references; dropped {dropped or 'nothing'}"


def training_rows(examples: Iterable[Example]) -> list[dict[str, str]]:
    """One row {"input", "output"} for each reference of each example, with "category" where there is one."""
    rows = []
    for example in examples:
        shared = {} if example.category is None else {"category": example.category}
        rows += [{"input": example.input, "output": text, **shared} for text in example.references]
    return rows


def text_field(fields: Mapping[str, Any], *names: str) -> str:
    """The text in the first of the columns `names` that is there.

    Raises:
        DataError: none of them is there, or what is there is not a text.
    """
    for name in names:
        if name in fields:
            value = fields[name]
            if not isinstance(value, str):
                got = "nothing" if value is None else type(value).__name__
                raise DataError(f"expected a text in {name!r}; got {got}")
            return value
    wanted, got = " or ".join(map(repr, names)), ", ".join(map(repr, fields))[:200]
    raise DataError(f"expected the column {wanted}; got {got or 'none'}")


def records_field(fields: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The objects in the column `name`: a list of them, or, as the hub may keep it, an object of lists.

    Raises:
        DataError: there is no such column, or it holds something else.
    """
    value = fields.get(name)
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) <= 1:
            return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise DataError(f"expected a list of objects in {name!r}; got {value!r:.100}")


class Collector:
    """Gathers examples in order of first appearance, and counts what is dropped."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, tuple[str, list[str], str | None, str]] = {}
        self._dropped: Counter[str] = Counter()

    def add(
        self,
        input: str,
        references: Iterable[str],
        *,
        id: str,
        category: str | None = None,
        key: Hashable = None,
    ) -> None:
        """Add references for an input. Those of one `key` make one example; without a key each add is one."""
        input, id = _clean(input), _clean(id)
        category = None if category is None else _clean(category)
        if not input:
            self.drop("empty input")
            return
        if key is None:
            key = (id, len(self._groups))
        for reference in map(_clean, references):
            if reference:
                self._groups.setdefault(key, (input, [], category, id))[1].append(reference)
            else:
                self.drop("empty reference")

    def add_prepared(self, fields: Mapping[str, Any], *, id: str) -> None:
        """Add a row as `prepare` writes it: "input", "output", and perhaps "category" and "id"."""
        input, output = text_field(fields, "input"), text_field(fields, "output")
        category = text_field(fields, "category") if fields.get("category") is not None else None
        group = None if fields.get("id") is None else str(fields["id"])
        self.add(input, [output], id=group or id, category=category, key=(group, category, input.strip()))

    def drop(self, reason: str) -> None:
        self._dropped[reason] += 1

    def result(self, source: object) -> tuple[list[Example], Report]:
        """The examples and the report. Raises `DataError`, naming `source`, where nothing was kept."""
        examples = [
            Example(input, tuple(references), category, id) for input, references, category, id in self._groups.values()
        ]
        report = Report(
            kept=len(examples),
            references=sum(len(example.references) for example in examples),
            dropped=dict(self._dropped),
        )
        if not examples:
            raise DataError(f"{source}: expected at least one input with a reference; {report}")
        return examples, report


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no tokenizer and no UTF-8 file can hold
        raise DataError(f"expected Unicode text; got a lone surrogate in {text[:60]!a}") from None
    return text.strip()
