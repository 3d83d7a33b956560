"""Records become rows of tokens [x; y]; `foreword.batching` makes batches of them.

A record is a mapping with the columns of a line of JSONL, CSV or TSV. x is framed by a template over its columns, or by
the base's chat template, and y is its output. x and y are tokenized apart and joined, so that what the model sees at
generation is exactly what it saw in training. y ends with the end token.
"""

from __future__ import annotations

import csv
import io
import json
import math
import numbers
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.errors import DataError, SettingsError, TooLongError, one_line
from foreword.prefix import Framing
from foreword.reading import text_of

if TYPE_CHECKING:
    from foreword.bases import Base

__all__ = ["Row", "check_records", "frame", "read_records", "rows_of", "tokenize"]

Record = Mapping[str, Any]

_CONTENT = "content of the last message"
"""Stands in a chat's last message where what the template puts after it is asked for."""


@dataclass(frozen=True)
class Row:
    """Token ids of x and of y; y is empty where a row is there to be continued."""

    x: list[int]
    y: list[int]

    def __len__(self) -> int:
        return len(self.x) + len(self.y)

    @property
    def ids(self) -> list[int]:
        """What a decoder-only base is run on: the last token predicts nothing."""
        return [*self.x, *self.y[:-1]]


def read_records(path: str | PathLike[str], *, input: str = "input", output: str = "output") -> list[dict[str, Any]]:
    """Read a file of records: JSONL, CSV or TSV by its name's end; any other is read as JSONL.

    Args:
        path: the file, UTF-8.
        input, output: the columns that hold x and y. In what is returned they are called "input" and "output", too.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: one column is to be both.
        DataError: the file is empty, is not UTF-8, a line is not a record, or lacks a column that was named here.
    """
    path = Path(path)
    names = column_names(input, output)
    text = text_of(path.read_bytes(), path)
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = table_rows(path, text, "\t" if path.suffix.lower() == ".tsv" else ",")
        records = [record for _, record in rows]
    else:
        records = list(_read_jsonl(path, text))
    if not records:
        raise DataError(f"{path}: expected at least one record; the file has none")
    return [renamed(record, names, f"{path}, record {number}") for number, record in enumerate(records, 1)]


def column_names(input: str, output: str) -> dict[str, str]:
    """What the columns that hold x and y are to be called, where they have other names.

    Raises:
        SettingsError: one column is to be both.
    """
    if input == output:
        raise SettingsError(f"expected two columns, of x and of y; got {input!r} for both")
    return {old: new for old, new in ((input, "input"), (output, "output")) if old != new}


def renamed(record: Record, names: Mapping[str, str], where: str) -> dict[str, Any]:
    """A record with its columns called as `column_names` says, too: a template may name either.

    Raises:
        DataError: it lacks one of them.
    """
    for name in names:
        if name not in record:
            raise DataError(f"{where}: expected the column {name!r}; got {_columns(record)}")
    # a column that is asked for by name wins over one that merely is called so
    return {**record, **{new: record[old] for old, new in names.items()}}


def _columns(record: Record) -> str:
    return one_line(", ".join(sorted(map(repr, record))) or "none")


def _read_jsonl(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield record_of(line, f"{path}, line {number}")


def record_of(line: str, where: str) -> dict[str, Any]:
    """One line of JSONL.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object a line; {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object; got {type(record).__name__}")
    return record


def table_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with a header, each with the number of its last line."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(max(len(text), 1))  # the module's own is below the length of some documents
    try:
        fields = list(reader.fieldnames or ())
        if len(set(fields)) < len(fields):
            twice = next(name for name in fields if fields.count(name) > 1)
            raise DataError(f"{path}: expected each column once in the header; got {twice!r} twice")
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(fields)} columns, as in the header; this line has "
                    "another number"
                )
            yield reader.line_num, dict(record)
    except csv.Error as error:
        # the reader's number is of the row before
        raise DataError(f"{path}, line {reader.line_num + 1}: not a table ({error})") from None
    finally:
        csv.field_size_limit(limit)


def fields_of(template: str) -> list[tuple[str, str | None]]:
    """A template's parts, (literal text, field name or None); plain names alone, as records are not ours."""
    try:
        parts = [
            (literal, name, spec, conversion) for literal, name, spec, conversion in string.Formatter().parse(template)
        ]
    except ValueError as error:
        raise SettingsError(f"expected a template such as '{{input}}\\n'; got {template!r}: {error}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not re.fullmatch(r"[\w -]+", name)):
            raise SettingsError(f"expected plain column names in braces; got {name!r} in the template {template!r}")
    return [(literal, name) for literal, name, _, _ in parts]


def frame(base: Base, record: Record, framing: Framing, where: str = "the record") -> list[int]:
    """The token ids of x.

    A beginning-of-sequence token, where the base's tokenizer puts one, is at x's head. In a decoder-only base x has no
    end token: y follows.

    Raises:
        DataError: a column that the template names is missing, or holds something other than text or a number.
        SettingsError: what stands before and after the last field alone is longer than `max_input_tokens`.
    """
    if framing.chat:
        messages = _question(record, where)
        text = _chat(base, messages, where)
    else:
        parts = fields_of(framing.template)
        text = _filled(record, parts, where)
    x = tokenize(base, text, where, add_special_tokens=not framing.chat)
    if not (framing.chat or base.is_encoder_decoder) and x and x[-1] == base.end_id:
        x = x if text.endswith(base.tokenizer.eos_token) else x[:-1]
    if framing.max_input_tokens is not None and len(x) > framing.max_input_tokens:
        if framing.chat:
            marked = _chat(base, [*messages[:-1], {**messages[-1], "content": _CONTENT}], where)
            before, _, after = marked.rpartition(_CONTENT)
        else:
            last = max((i for i, (_, name) in enumerate(parts) if name is not None), default=-1)
            before = _filled(record, [*parts[:last], (parts[last][0], None)], where) if last >= 0 else ""
            after = "".join(literal for literal, _ in parts[last + 1 :])
        begin, upto = (
            tokenize(base, head, where, add_special_tokens=not framing.chat)
            for head in (before, text.removesuffix(after))
        )
        x = _shorten(base, x, begin, upto, framing.max_input_tokens, where)
    if not x:
        raise DataError(f"{where}: expected an input of at least one token; x is empty")
    return x


def _filled(record: Record, parts: Iterable[tuple[str, str | None]], where: str) -> str:
    return "".join(literal + ("" if name is None else _text(record, name, where)) for literal, name in parts)


def _question(record: Record, where: str) -> list[dict[str, str]]:
    """The messages before the answer; an input by itself is the user's."""
    _check_mapping(record, where)
    given = record.get("messages")
    if given is None and record.get("input") is not None:
        given = [{"role": "user", "content": _text(record, "input", where)}]
    return _check_messages(given, where)[0]


def _answer(record: Record, framing: Framing, where: str) -> str:
    """The text of y."""
    if framing.chat and record.get("messages") is not None:
        answer = _check_messages(record["messages"], where)[1]
    else:
        answer = _text(record, "output", where)
    if answer is None or not answer.strip():
        raise DataError(f"{where}: expected a non-empty output; y is empty: drop the record or fill it")
    return answer


def _shorten(base: Base, x: list[int], before: list[int], upto: list[int], limit: int, where: str) -> list[int]:
    """Cut x to `limit` tokens at the end of its last field, which x is `before` without, and `upto` as far as its end."""

    def shared(head: list[int]) -> int:
        head = head[:-1] if head and head[-1] == base.end_id else head
        return next((i for i, (a, b) in enumerate(zip(x, head, strict=False)) if a != b), min(len(x), len(head)))

    end = x[shared(upto) :]
    least = shared(before) + len(end)
    if least >= limit:
        raise SettingsError(
            f"{where}: expected max_input_tokens above {least}, the tokens before and after the last field, which alone is "
            f"cut; got {limit}"
        )
    return x[: limit - len(end)] + end


def tokenize(base: Base, text: str, where: str, **options: Any) -> list[int]:
    """The token ids of a text; `options` are the tokenizer's.

    Raises:
        DataError: it is no Unicode text, or has tokens that the base lacks.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON and the shell can spell half a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: expected Unicode text; got a lone surrogate, {text[error.start]!a}") from None
    # its remarks on long texts aside: whether one fits is looked at where P is known
    ids: list[int] = base.tokenizer(text, verbose=False, **options)["input_ids"]
    if max(ids, default=0) >= len(base.embeddings):
        raise DataError(
            f"{where}: expected tokens that the base has; {base.tokenizer.convert_ids_to_tokens(max(ids))!r} was added to "
            f"the tokenizer of {base.name!r} alone: resize the model's embeddings"
        )
    return ids


def _check_mapping(record: Record, where: str) -> None:
    # what pandas calls a row is none of collections.abc's, and serves
    if not hasattr(record, "get"):
        raise DataError(
            f"{where}: expected a mapping, such as {{'input': ..., 'output': ...}}; got {type(record).__name__}"
        )


def _text(record: Record, name: str, where: str) -> str:
    _check_mapping(record, where)
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        came = "no such column" if name not in record else type(value).__name__
        messages = record.get("messages") is not None
        hint = ": rows of messages are for prefixes trained with --chat, or Framing(chat=True)" if messages else ""
        raise DataError(
            f"{where}: expected text in the column {name!r}; got {came} (columns: {_columns(record)}){hint}"
        )
    if not isinstance(value, str | numbers.Integral) and not math.isfinite(value):
        raise DataError(f"{where}: expected text or a finite number in the column {name!r}; got {value}")
    return str(value)


def _check_messages(messages: Any, where: str) -> tuple[list[dict[str, str]], str | None]:
    """The messages before the answer, and the answer: the last message where it is the assistant's."""
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not messages:
        raise DataError(
            f"{where}: expected 'messages', a list of objects with 'role' and 'content'; got {one_line(repr(messages), 80)}"
        )
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise DataError(f"{where}: expected a message before the assistant's answer; there is none")
        return messages[:-1], messages[-1]["content"]
    return messages, None


def _chat(base: Base, messages: list[dict[str, str]], where: str) -> str:
    if base.tokenizer.chat_template is None:
        raise DataError("the base has no chat template: give rows with 'input' and 'output' instead of 'messages'")
    try:
        text = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # a template is a program, and may trip over anything
        raise DataError(f"{where}: the base's chat template refuses the messages: {one_line(error)}") from None
    assert isinstance(text, str)
    return text


def check_records(records: Iterable[Record], framing: Framing, *, what: str = "record") -> None:
    """Look for what `rows_of` would refuse, as far as it shows without a base.

    Raises:
        DataError: a record lacks a column, or its y is empty.
    """
    parts = fields_of(framing.template)
    for number, record in enumerate(records, 1):
        where = f"{what} {number}"
        if framing.chat:
            _question(record, where)
        else:
            _filled(record, parts, where)
        _answer(record, framing, where)


def rows_of(
    base: Base,
    records: Iterable[Record],
    framing: Framing,
    *,
    length: int = 0,
    max_output_tokens: int | None = None,
    what: str = "record",
) -> list[Row]:
    """Tokenize records for training.

    Args:
        base: whose tokenizer and context count.
        records: with the columns that the framing names, and "output"; or "messages" that end with the assistant's.
        framing: how x is made.
        length: P; virtual tokens count toward a decoder-only base's context.
        max_output_tokens: a longer y is cut, before its end token.
        what: what an error calls a record, before its number.

    Raises:
        DataError: a record lacks a column, or its x or y is empty.
        TooLongError: a row does not fit the base's context.
    """
    rows = []
    for number, record in enumerate(records, 1):
        where = f"{what} {number}"
        x = frame(base, record, framing, where)
        answer = _answer(record, framing, where)
        y = _output(base, answer, max_output_tokens, where)
        check_fits(base, len(x), len(y), length, where)
        rows.append(Row(x, y))
    if not rows:
        raise DataError(f"expected at least one {what}; got none")
    return rows


def _output(base: Base, text: str, limit: int | None, where: str) -> list[int]:
    # an encoder-decoder base's decoder begins as its tokenizer has it (BART's does with <s>)
    y = tokenize(base, text, where, add_special_tokens=base.is_encoder_decoder)
    while y and y[-1] == base.end_id:
        y = y[:-1]
    if not set(y) - {base.tokenizer.bos_token_id}:
        raise DataError(f"{where}: expected a non-empty output; y is the end token alone: drop the record or fill it")
    begun = y[:1] == [base.tokenizer.bos_token_id]
    return [*y[: None if limit is None else limit + begun], base.end_id]


def check_fits(base: Base, x: int, y: int, length: int, where: str) -> None:
    """Raise `TooLongError` where x and y, in tokens, and P don't fit the base's context; y of one token is yet to come."""
    if base.context is None:
        return
    needed = max(x, y) if base.is_encoder_decoder else length + x + y
    if needed > base.context:
        what = f"x of {x} and y of {y} tokens" + ("" if base.is_encoder_decoder else f" after {length} virtual tokens")
        alone = y if base.is_encoder_decoder else length + 1 + y
        cut = "max_output_tokens" if y > 1 and alone > base.context else "max_input_tokens"
        raise TooLongError(
            f"{where}: expected at most {base.context} positions, the base's context; got {what}: shorten it, or "
            f"train with {cut}"
        )
