"""Files become records, records become [x; y], and rows become batches that say where y is."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    BOS,
    CONTEXT,
    DECODER_ONLY,
    ENCODER_DECODER,
    EOS,
    PAD,
    base_of,
    random_prefix,
    refused,
    tiny_model,
    tiny_tokenizer,
)
from tokenizers import processors
from torch.nn.functional import cross_entropy

from foreword.attach import attach
from foreword.bases import Base
from foreword.batching import batches, collate, likeness, passes
from foreword.data import Row, frame, read_records, rows_of
from foreword.errors import DataError, SettingsError, TooLongError
from foreword.prefix import Framing

ALL = (*DECODER_ONLY, *ENCODER_DECODER)
BEGINS = ("opt", "llama", "mistral", "gemma3", "bart")
"""Families whose tokenizers put a token at the beginning."""
CHAT = (
    "{% for m in messages %}<a>{{ m['role'] }}\n{{ m['content'] | trim }}<b>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>assistant\n{% endif %}"
)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """The warnings that transformers logs meanwhile."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def tiny_base(family: str, *, chat_template: str | None = None, **config: Any) -> Base:
    base = Base(tiny_model(family, **config), tiny_tokenizer(family), f"tiny {family}")
    base.tokenizer.chat_template = chat_template
    return base


def ids(base: Base, text: str) -> list[int]:
    """A token a byte, and one for each special token that is written out."""
    tokens = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert base.tokenizer.decode(tokens) == text
    return tokens


def head(family: str) -> list[int]:
    return [BOS] if family in BEGINS else []


def x_of(base: Base, family: str, text: str) -> list[int]:
    return [*head(family), *ids(base, text), *([EOS] if family in ENCODER_DECODER else [])]


# ---- files -----------------------------------------------------------------------------------------------

ODD = "one\u2028two\u0085three\x1cfour\x0cfive, \"six\"\n\tseven 'eight' \U0001f600 é"
"""Breaks that are none in JSONL and CSV, and what has to be quoted."""


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n \r\n"])
def test_jsonl(tmp_path: Path, name: str, begin: bytes, end: str) -> None:
    records = [{"input": ODD, "output": "a"}, {"input": "b", "output": "", "more": [1, None]}]
    text = end.join(json.dumps(record, ensure_ascii=False) for record in records)
    assert "\u2028" in text
    for whole in (text, text + end):
        assert read_records(written(tmp_path, name, begin + whole.encode())) == records


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.CSV", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables(tmp_path: Path, name: str, delimiter: str, begin: bytes, end: str) -> None:
    quoted = '"' + ODD.replace('"', '""') + '"'
    lines = [["input", "output"], [quoted, "a"], ['"a\r\nb"', ""], ['say "x"', '""'], ["", "c"]]
    content = end.join(delimiter.join(line) for line in lines) + end + end
    assert read_records(written(tmp_path, name, begin + content.encode())) == [
        {"input": ODD, "output": "a"},
        {"input": "a\r\nb", "output": ""},
        {"input": 'say "x"', "output": ""},
        {"input": "", "output": "c"},
    ]


def test_columns_are_renamed(tmp_path: Path) -> None:
    """One that was asked for by name wins over one that merely is called so, and keeps its own name for templates."""
    lines = [
        {"mr": "x", "ref": "y", "id": 1},
        {"output": "other", "mr": "x", "input": "other", "ref": "y"},
        {"mr": "x", "ref": "y", "input": "other"},
    ]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_records(path, input="mr", output="ref") == [
        {"mr": "x", "ref": "y", "input": "x", "output": "y", "id": 1},
        {"mr": "x", "ref": "y", "input": "x", "output": "y"},
        {"mr": "x", "ref": "y", "input": "x", "output": "y"},
    ]
    assert read_records(path, input="mr")[1:] == [
        {"mr": "x", "output": "other", "input": "x", "ref": "y"},
        {"mr": "x", "input": "x", "ref": "y"},
    ]
    both = written(tmp_path, "b.csv", "input,output\na,b\n")
    assert read_records(both, input="output", output="input") == [{"output": "a", "input": "b"}]


def test_a_table_may_hold_long_documents(tmp_path: Path) -> None:
    """Longer than the csv module takes by itself."""
    limit = csv.field_size_limit()
    text = "long " * limit
    (record,) = read_records(written(tmp_path, "a.csv", f"input,output\n{text},short\n"))
    assert record == {"input": text, "output": "short"}
    assert csv.field_size_limit() == limit


def test_records_that_are_none_are_refused() -> None:
    base = tiny_base("gpt2")
    for record in ("text", None, math.nan, ["a"]):
        for framing in (Framing(), Framing(chat=True)):
            with refused(DataError, f"record 1: expected a mapping, such as .*; got {type(record).__name__}"):
                rows_of(base, [record], framing)  # type: ignore[list-item]
    (row,) = rows_of(base, [{"input": np.int64(3), "output": np.float32(0.5)}], Framing())
    assert (base.decode(row.x), base.decode(row.y[:-1])) == ("3\n", "0.5")
    (row,) = rows_of(base, [{"input": 10**400, "output": "a"}], Framing(max_input_tokens=9))
    assert base.decode(row.x) == "10000000\n"
    with refused(DataError, "expected text or a finite number in the column 'input'; got nan"):
        rows_of(base, [{"input": np.float32("nan"), "output": "a"}], Framing())
    with refused(DataError, r"expected 'messages', a list .*; got array"):
        rows_of(base, [{"messages": np.array(["a" * 90, "b"] * 9)}], Framing(chat=True))
    with refused(DataError, "record 1: expected text in the column 'input'; .*columns: 'in\\\\nput', 'output'"):
        rows_of(base, [{"in\nput": "a", "output": "b"}], Framing())
    with refused(SettingsError, r"expected plain column names in braces; got 'a\\nb'"):
        rows_of(base, [{"input": "a", "output": "b"}], Framing(template="{a\nb}"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: expected at least one record; the file has none"),
        ("a.jsonl", b"\n \r\n\n", "expected at least one record"),
        ("a.csv", b"", "expected at least one record"),
        ("a.tsv", b"input\toutput\n", "expected at least one record"),
        (
            "a.jsonl",
            b'{"input": "\xff"}',
            "expected UTF-8; byte 11 \\(0xff\\) is not: save it as UTF-8, e.g. with iconv",
        ),
        ("a.csv", "input,output\né,a\n".encode("latin-1"), "expected UTF-8; byte 13 \\(0xe9\\), in line 2, is not"),
        ("a.jsonl", '{"input": "a"}\n'.encode("utf-16"), "expected UTF-8; byte 0 \\(0xff\\) is not"),
        ("a.jsonl", b'{"input": "a"}\n{"input": "b"', "a.jsonl, line 2: expected one JSON object a line; Expecting"),
        ("a.jsonl", b'{"input": "a"}{"input": "b"}', "line 1: expected one JSON object a line; Extra data"),
        ("a.jsonl", b'\n{"input": "a\tb"}', "line 2: expected one JSON object a line; Invalid control"),
        ("a.jsonl", b"[" * 200_000, "line 1: expected one JSON object a line; maximum recursion"),
        ("a.jsonl", b'{"input": ' + b"1" * 5000 + b"}", "line 1: expected one JSON object a line; Exceeds the limit"),
        ("a.jsonl", b'["a", "b"]', "line 1: expected a JSON object; got list"),
        ("a.jsonl", b'"a"', "line 1: expected a JSON object; got str"),
        ("a.csv", b"input,output\na,b\nc\n", r"a\.csv, line 3: expected 2 columns, as in the header; this line has"),
        ("a.csv", b'input,output\n"a\nb",b,c\n', "line 3: expected 2 columns"),
        ("a.tsv", b"input,output\na\tb\n", "line 2: expected 1 columns"),
        ("a.csv", b'input,output\n"a,b\n', r"line 2: not a table \(unexpected end of data\)"),
        ("a.csv", b'input,output\na,b\n"a,b\nc,d\n', r"line 3: not a table"),
        ("a.csv", b'input,output\n"a" b,c\n', "line 2: not a table .*expected after"),
        ("a.csv", b"input,output,input\na,b,c\n", "expected each column once in the header; got 'input' twice"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with refused(DataError, message):
        read_records(written(tmp_path, name, content))


def test_columns_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"mr": "a", "input": "b", "ref": "c"}\n{"input": "b", "output": "c"}')
    with refused(DataError, r"a\.jsonl, record 2: expected the column 'mr'; got 'input', 'output'"):
        read_records(path, input="mr")
    with refused(DataError, "record 1: expected the column 'refs'; got 'input', 'mr', 'ref'"):
        read_records(path, input="mr", output="refs")
    with refused(SettingsError, "expected two columns, of x and of y; got 'mr' for both"):
        read_records(path, input="mr", output="mr")
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")


# ---- x ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_x_is_the_template_with_the_records_columns(family: str) -> None:
    base = tiny_base(family)
    record = {"input": "{output} a{{b", "output": "never", "house-style": "é", "Product Name": 7, "price": 1.5}
    assert frame(base, record, Framing()) == x_of(base, family, "{output} a{{b\n")
    template = "{{{house-style}}} {Product Name}, {price}: {input}{input}}}\n"
    text = "{é} 7, 1.5: {output} a{{b{output} a{{b}\n"
    assert frame(base, record, Framing(template=template)) == x_of(base, family, text)
    assert frame(base, {}, Framing(template="only words")) == x_of(base, family, "only words")


def test_the_tokenizers_end_token_is_taken_from_x_alone() -> None:
    """Some decoder-only bases' tokenizers end every text; one that a template writes is the user's."""
    base = tiny_base("llama")
    base.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert base.tokenizer("a")["input_ids"] == [BOS, *ids(base, "a"), EOS]
    assert frame(base, {"input": "a"}, Framing(template="{input}:")) == [BOS, *ids(base, "a:")]
    assert frame(base, {"input": "abcdefg"}, Framing(template="{input}:", max_input_tokens=4)) == [
        BOS,
        *ids(base, "ab:"),
    ]
    (row,) = rows_of(base, [{"input": "a", "output": "b"}], Framing())
    assert row == Row([BOS, *ids(base, "a\n")], [*ids(base, "b"), EOS])
    plain = tiny_base("gpt2")
    assert frame(plain, {"input": "a"}, Framing(template="{input}</s>"))[-1] == EOS


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{input.__class__}", r"expected plain column names in braces; got 'input.__class__'"),
        ("{input.__init__.__globals__}", "plain column names"),
        ("{input[0]}", "plain column names"),
        ("{0.real}", "plain column names"),
        ("{input!r}", "plain column names"),
        ("{input:>1000000000}", "plain column names"),
        ("{input:{output}}", "plain column names"),
        ("{}", "plain column names"),
        ('{"a": 1}', "plain column names"),
        ("{input", "expected a template such as .*; got '{input'"),
        ("input}", "expected a template such as"),
    ],
)
def test_hostile_templates_are_refused(template: str, message: str) -> None:
    with refused(SettingsError, message):
        frame(tiny_base("gpt2"), {"input": "a", "output": "b", "0": "c"}, Framing(template=template))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a", "output": "b"},
            r"here: expected text in the column 'input'; got no such column \(columns: 'o.*', 't",
        ),
        ({}, r"no such column \(columns: none\)"),
        ({"input": None}, "got NoneType"),
        ({"input": ["a"]}, "got list"),
        ({"input": True}, "got bool"),
        ({"input": float("nan")}, "here: expected text or a finite number in the column 'input'; got nan"),
        ({"input": float("inf")}, "finite number in the column 'input'; got inf"),
        ({"input": "a\ud800b"}, r"here: expected Unicode text; got a lone surrogate, '\\ud800'"),
    ],
)
def test_records_that_cannot_be_framed_are_refused(record: dict[str, Any], message: str) -> None:
    with refused(DataError, message):
        frame(tiny_base("gpt2"), record, Framing(), "here")


def test_an_empty_x_is_refused() -> None:
    with refused(DataError, "the record: expected an input of at least one token; x is empty"):
        frame(tiny_base("gpt2"), {"input": ""}, Framing(template="{input}"))
    assert frame(tiny_base("llama"), {"input": ""}, Framing(template="{input}")) == [BOS]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_a_long_x_loses_the_end_of_its_last_field(family: str) -> None:
    base = tiny_base(family)
    record = {"title": "abc", "input": "defghijklmnop" * 40, "note": "no"}

    def cut(template: str, limit: int) -> list[int]:
        return frame(base, record, Framing(template=template, max_input_tokens=limit))

    special = len(x_of(base, family, ""))
    assert cut("{title}: {input}}}\n", special + 10) == x_of(base, family, "abc: def}\n")
    assert cut("{title}: {input}", special + 10) == x_of(base, family, "abc: defgh")
    assert cut("{title}: {input}{{=}}", special + 10) == x_of(base, family, "abc: de{=}")
    assert cut("{title}\n", special + 4) == x_of(base, family, "abc\n"), "as long as it may be"
    assert cut("{title}\n", special + 3) == x_of(base, family, "ab\n")
    after = 4 + (family in ENCODER_DECODER)
    with refused(
        SettingsError, f"expected max_input_tokens above {special + 4}, the tokens before and after the .*got {after}"
    ):
        cut("{input} =>\n", after)
    before = special + len("abc: ") + 1
    assert cut("{title}: {input}!", before + 1) == x_of(base, family, "abc: d!")
    with refused(SettingsError, f"the record: expected max_input_tokens above {before}, .*got {before}"):
        cut("{title}: {input}!", before)
    with refused(SettingsError, "expected max_input_tokens of at least 1; got 0"):
        cut("{input}", 0)


def test_a_token_of_the_fields_end_and_the_template_is_kept_whole() -> None:
    base = tiny_base("gpt2")
    base.tokenizer.add_tokens(["!\n"])
    base.model.resize_token_embeddings(len(base.tokenizer))
    merged = base.tokenizer.convert_tokens_to_ids("!\n")
    assert frame(base, {"input": "abcd!"}, Framing(max_input_tokens=3)) == [*ids(base, "ab"), merged]


# ---- chats -----------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "what is it?"},
]


def test_messages_are_framed_by_the_bases_chat_template() -> None:
    base = tiny_base("gpt2", chat_template=CHAT)
    (row,) = rows_of(base, [{"messages": [*TALK, {"role": "assistant", "content": "a bird"}]}], Framing(chat=True))
    text = "<a>system\nbe brief<b>\n<a>user\nhi<b>\n<a>assistant\nyes?<b>\n<a>user\nwhat is it?<b>\n<a>assistant\n"
    assert row == Row(ids(base, text), [*ids(base, "a bird"), EOS])
    expected = base.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert frame(base, {"messages": TALK}, Framing(chat=True)) == row.x == expected


def test_the_chat_template_alone_says_where_a_beginning_is() -> None:
    base = tiny_base("llama", chat_template="{{ bos_token }}" + CHAT)
    text = "<s><a>user\nhi<b>\n<a>assistant\n"
    assert frame(base, {"messages": TALK[1:2]}, Framing(chat=True)) == ids(base, text)
    base.tokenizer.chat_template = CHAT
    assert BOS not in frame(base, {"messages": TALK[1:2]}, Framing(chat=True))


def test_a_text_is_what_the_user_says() -> None:
    base = tiny_base("gpt2", chat_template=CHAT)
    (row,) = rows_of(base, [{"input": "hi", "output": "yo", "messages": None}], Framing(chat=True))
    assert row == Row(ids(base, "<a>user\nhi<b>\n<a>assistant\n"), [*ids(base, "yo"), EOS])


def test_a_long_chat_keeps_what_the_template_puts_last() -> None:
    base = tiny_base("gpt2", chat_template=CHAT)
    messages = [{"role": "user", "content": " assistant" * 50}]
    x = frame(base, {"messages": messages}, Framing(chat=True, max_input_tokens=30))
    assert base.tokenizer.decode(x) == "<a>user\nassistant a<b>\n<a>assistant\n"
    assert len(x) == 30
    with refused(SettingsError, "expected max_input_tokens above 19, the tokens before and after the .*; got 19"):
        frame(base, {"messages": messages}, Framing(chat=True, max_input_tokens=19))
    earlier = [*TALK, {"role": "user", "content": "why" * 50}]
    least = len(frame(base, {"messages": earlier}, Framing(chat=True))) - 150
    x = frame(base, {"messages": earlier}, Framing(chat=True, max_input_tokens=least + 2))
    assert base.tokenizer.decode(x).endswith("what is it?<b>\n<a>user\nwh<b>\n<a>assistant\n")
    with refused(SettingsError, f"expected max_input_tokens above {least}, the tokens before and after"):
        frame(base, {"messages": earlier}, Framing(chat=True, max_input_tokens=least))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "expected 'messages', a list of objects with 'role' and 'content'; got None"),
        ("hi", "got 'hi'"),
        ([], r"got \[\]"),
        ([{"role": "user"}], r"got \[\{'role': 'user'\}\]"),
        ([{"role": "user", "content": [{"type": "text", "text": "line\nline"}]}], "got .*'content': "),
        ([{"role": "assistant", "content": "a"}], "expected a message before the assistant's answer; there is none"),
        ([{"role": "tool", "content": "a"}], "the base's chat template refuses the messages: no tools here"),
        ([{"role": "odd", "content": "a"}], "the base's chat template refuses the messages: .*'int'"),
        ([{"role": "user", "content": "\udc80"}], "expected Unicode text; got a lone surrogate"),
    ],
)
def test_bad_messages_are_refused(messages: Any, message: str) -> None:
    guard = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools\nhere') }}{% endif %}"
    guard += "{% if messages[0]['role'] == 'odd' %}{{ 1 + 'a' }}{% endif %}"
    base = tiny_base("gpt2", chat_template=guard + CHAT)
    with refused(DataError, message):
        frame(base, {"messages": messages}, Framing(chat=True), "record 3")


def test_a_token_that_the_base_has_not() -> None:
    base = tiny_base("gpt2")
    base.tokenizer.add_tokens(["zzz"])
    message = (
        "record 3: expected tokens that the base has; 'zzz' was added to the tokenizer of 'tiny gpt2' alone: resize"
    )
    with refused(DataError, message):
        frame(base, {"input": "a zzz"}, Framing(), "record 3")
    with refused(DataError, message.replace("3", "1")):
        rows_of(base, [{"input": "a", "output": "zzz"}], Framing(), length=5)


def test_a_chat_needs_a_template_and_an_answer() -> None:
    with refused(DataError, "the base has no chat template: give rows with 'input' and 'output' instead"):
        frame(tiny_base("gpt2"), {"messages": TALK}, Framing(chat=True))
    with refused(DataError, "record 1: expected a non-empty output; y is empty"):
        rows_of(tiny_base("gpt2", chat_template=CHAT), [{"messages": TALK}], Framing(chat=True))


# ---- y and the context -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_rows_end_with_one_end_token(family: str) -> None:
    base = tiny_base(family)
    outputs = ["b", "bc</s>", "bc</s></s>", " b</s>c", "é" * 9]
    rows = rows_of(base, [{"input": "a", "output": text} for text in outputs], Framing())
    # BART's decoder has the tokenizer's first token to predict as well
    first = [BOS] if family == "bart" else []
    for row, text in zip(rows, ["b", "bc", "bc", " b</s>c", "é" * 9], strict=True):
        assert row.x == frame(base, {"input": "a"}, Framing()), "as at generation"
        assert row.y == [*first, *ids(base, text), EOS]
        assert len(row) == len(row.x) + len(row.y)
    (row,) = rows_of(base, [{"input": "a", "output": "bcdefg"}], Framing(), max_output_tokens=3)
    assert row.y == [*first, *ids(base, "bcd"), EOS]


def test_long_texts_leave_no_remark(logged: list[logging.LogRecord]) -> None:
    """transformers warns once of texts beyond the tokenizer's length, which foreword looks at itself."""
    base = tiny_base("t5")
    (row,) = rows_of(base, [{"input": "a" * (CONTEXT + 1), "output": "b" * (CONTEXT + 1)}], Framing())
    assert min(len(row.x), len(row.y)) > base.tokenizer.model_max_length
    assert logged == []
    base.tokenizer("a" * (CONTEXT + 1))
    assert len(logged) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input": "a"}, "record 2: expected text in the column 'output'; got no such column"),
        ({"input": "a", "output": ""}, "record 2: expected a non-empty output; y is empty: drop the record or fill it"),
        ({"input": "a", "output": " \n\u2003"}, "record 2: expected a non-empty output"),
        ({"input": "a", "output": "</s></s>"}, "record 2: expected a non-empty output; y is the end token alone"),
        (
            {"messages": [], "output": "b"},
            "'input'.*columns: 'messages', 'output'.: rows of messages are for prefixes trained with --chat, or Framing",
        ),
        ({"input": "a", "output": "\udfff"}, "record 2: expected Unicode text"),
        ({"input": "a", "output": "b" * CONTEXT}, "record 2: expected at most 131 positions"),
    ],
)
def test_bad_records_are_refused_by_number(record: dict[str, Any], message: str) -> None:
    with refused(DataError, message):
        rows_of(tiny_base("gpt2"), [{"input": "a", "output": "b"}, record], Framing())


def test_a_number_is_a_question_too() -> None:
    base = tiny_base("llama")
    base.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = Framing(chat=True)
    assert frame(base, {"input": 30}, chat) == frame(base, {"input": "30", "messages": None}, chat)


def test_no_records_are_refused() -> None:
    with refused(DataError, "expected at least one record; got none"):
        rows_of(tiny_base("gpt2"), iter(()), Framing())


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bart"])
def test_the_longest_row_that_is_taken_fits(family: str) -> None:
    """P counts where virtual tokens have positions."""
    base = tiny_base(family)
    length = 5
    special = len(head(family)) + 1 + (family == "bart")
    x = CONTEXT - special if family == "bart" else CONTEXT - length - special - 8

    def row(more: int) -> Row:
        return rows_of(base, [{"input": "a" * (x + more), "output": "b" * 7}], Framing(), length=length)[0]

    batch = collate(base, [row(0)])
    with attach(base.model, random_prefix(base.model, length)):
        assert base.model(**batch.inputs).logits.isfinite().all()
    what = f"x of {len(row(0).x) + 1} and y of {len(row(0).y)} tokens"
    after = "" if family == "bart" else " after 5 virtual tokens"
    with refused(
        TooLongError,
        f"record 1: expected at most 131 positions, the base's context; got {what}{after}: shorten",
    ):
        row(1)
    if family == "bart":
        with refused(TooLongError, "got x of 4 and y of 132 tokens: shorten it, or train with max_output_tokens"):
            rows_of(base, [{"input": "a", "output": "b" * 130}], Framing())


# ---- batches ---------------------------------------------------------------------------------------------

PAIRS = [("a", "bcdef"), ("ghijkl", "m"), ("no", "pqr"), ("stuvwxy", "zabcdefghijk")]


def rows_for(base: Base) -> list[Row]:
    return rows_of(base, [{"input": x, "output": y} for x, y in PAIRS], Framing())


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("family", ALL)
def test_the_loss_at_ys_places_is_that_of_transformers_labels(family: str, pad_is_end: bool) -> None:
    """Which take a row alone, without padding."""
    base = tiny_base(family)
    if pad_is_end:
        base.tokenizer.pad_token = "</s>"
        assert base.pad_id == base.end_id == EOS
    rows = rows_for(base)
    batch = collate(base, rows)
    with torch.no_grad():
        logits = base.model(**batch.inputs).logits[batch.y_positions]
    assert batch.labels.tolist() == [token for row in rows for token in row.y]
    assert batch.infix.tolist() == [len(row.x) - 1 for row in rows]

    total = torch.zeros(())
    for row in rows:
        if family in ENCODER_DECODER:
            inputs, labels = row.x, row.y
        else:
            inputs, labels = [*row.x, *row.y], [*[-100] * len(row.x), *row.y]
        with torch.no_grad():
            mean = base.model(input_ids=torch.tensor([inputs]), labels=torch.tensor([labels])).loss
        total += mean * len(row.y)
    expected = total / len(batch.labels)
    assert expected > 1
    torch.testing.assert_close(cross_entropy(logits, batch.labels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_padding_hides_no_end_token_and_nothing_else_is_seen(family: str) -> None:
    """Masks come from lengths, never from ids: here x and y hold the padding's id, and the longest row has no padding."""
    base = tiny_base(family)
    base.tokenizer.pad_token = "</s>"
    rows = [Row([EOS, 5, EOS], [EOS, 6, EOS]), Row([7, EOS], [8, EOS]), Row([EOS], [EOS])]
    batch = collate(base, rows)
    assert batch.labels.tolist() == [EOS, 6, EOS, 8, EOS, EOS]
    assert batch.y_positions.sum(1).tolist() == [3, 2, 1]
    if family == "llama":
        assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 3, 1]
        assert batch.inputs["input_ids"].tolist() == [[EOS, 5, EOS, EOS, 6], [7, EOS, 8, EOS, EOS], [EOS] * 5]
        assert batch.y_positions.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    else:
        assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 2, 1]
        assert batch.inputs["decoder_input_ids"].tolist() == [[PAD, EOS, 6], [PAD, 8, EOS], [PAD, EOS, EOS]]
        assert batch.inputs["decoder_attention_mask"].sum(1).tolist() == [3, 2, 1]


def random_rows(count: int) -> list[Row]:
    lengths = torch.randint(2, 101, (count, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return [Row([1] * x, [2] * y) for x, y in lengths]


def padding(rows: list[Row], plan: list[list[int]]) -> float:
    """Share of places that hold no token."""
    places = sum(len(batch) * max(len(rows[i]) for i in batch) for batch in plan)
    return 1 - sum(map(len, rows)) / places


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 7), (97, 7), (1009, 16), (331, 1)])
def test_every_row_is_in_one_batch_of_each_epoch(count: int, size: int) -> None:
    rows = random_rows(count)
    for epoch in range(3):
        plan = batches(rows, size, seed=3, epoch=epoch)
        assert sorted(i for batch in plan for i in batch) == list(range(count))
        assert len(plan) == -(-count // size)
        assert sorted(map(len, plan))[1:] == [size] * (len(plan) - 1)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    rows = random_rows(1009)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    plan = batches(rows, 16, seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert batches(rows, 16, seed=3, epoch=2) == plan
    others = [batches(rows, 16, seed=seed, epoch=epoch) for seed, epoch in ((3, 1), (4, 2), (2**63, 2), (-1, 0))]
    companies = {frozenset(batch) for batch in plan}
    for other in others:
        assert other != plan
        assert len(companies & {frozenset(batch) for batch in other}) < 3, "rows meet others every epoch"


def test_batches_have_little_padding_and_no_order_of_length() -> None:
    rows = random_rows(1009)
    plan = batches(rows, 16, seed=0, epoch=0)
    in_order = [list(range(i, min(i + 16, 1009))) for i in range(0, 1009, 16)]
    assert padding(rows, in_order) > 0.3
    assert padding(rows, plan) < 0.05
    lengths = torch.tensor([[n, len(rows[batch[0]])] for n, batch in enumerate(plan)], dtype=torch.float64)
    assert abs(torch.corrcoef(lengths.T)[0, 1]) < 0.3


def test_rows_that_begin_alike_come_into_one_batch() -> None:
    generator = random.Random(0)
    records = [[record, *(generator.randint(0, 99) for _ in range(11))] for record in range(40)]
    rows = [Row(records[n % 40], [1] * generator.randint(3, 30)) for n in range(331)]

    def records_of(plan: list[list[int]]) -> float:
        return sum(len({rows[i].x[0] for i in batch}) for batch in plan) / len(plan)

    keys = len, likeness(base_of("llama")), likeness(base_of("bart"))
    by_length, plan, of_bart = (batches(rows, 16, seed=0, epoch=0, key=key) for key in keys)
    assert records_of(plan) < 0.8 * records_of(by_length)
    assert records_of(plan) > 8, "and is a mix all the same"
    assert padding(rows, plan) < 0.1
    assert of_bart == by_length == batches(rows, 16, seed=0, epoch=0)


def test_passes_hold_so_many_rows_and_tokens_and_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for most in (1, 23, 61, 5000):
        monkeypatch.setattr("foreword.batching.TOKENS_AT_ONCE", most)
        for rows_at_once in (1, 3, 50):
            rows = [Row([7] * rng.randint(1, 30), [8] * rng.randint(1, 9)) for _ in range(47)]
            made = passes(rows, rows_at_once)
            assert sorted(i for together in made for i in together) == list(range(47))
            lengths = [[len(rows[i]) for i in together] for together in made]
            assert [n for together in lengths for n in together] == sorted(map(len, rows))
            for together, after in itertools.pairwise([*lengths, [10**9]]):
                assert len(together) == 1 or len(together) * max(together) <= most
                assert len(together) <= rows_at_once
                fuller = [*together, after[0]]
                assert len(fuller) > rows_at_once or len(fuller) * after[0] > most, "one more had fitted"
    assert passes([], 5) == []
