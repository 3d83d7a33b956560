"""METEOR, ROUGE_L and CIDEr as the COCO caption evaluation has them, which the E2E challenge's script runs.

ROUGE_L and CIDEr are pycocoevalcap's. Its two Java programs, the PTB tokenizer and METEOR 1.5, are run from
here, with the same arguments: its own wrappers write into the installed package, lose METEOR's statistics,
which a bootstrap needs, and break where the locale writes 0,5 for 0.5.

It all needs the package pycocoevalcap, of the extra `eval`; METEOR and the tokenizer need Java (8 or later).
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO

import numpy as np

from foreword.errors import DataError, ForewordError, MissingExtraError

__all__ = ["UnavailableError", "cider", "meteor", "require", "rouge_l", "tokenize"]


class UnavailableError(ForewordError):
    """A metric cannot be computed on this machine: Java or a model it needs is not there."""


def require(module: str, package: str) -> ModuleType:
    """A module of a package of the extra `eval`.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError("eval", package) from error


def tokenize(texts: Sequence[str]) -> list[str]:
    """Texts as lower-case words of the Penn Treebank tokenizer, without punctuation, joined by spaces.

    Args:
        texts: one line each.

    Returns:
        As many lines. A text of punctuation alone becomes an empty line.

    Raises:
        UnavailableError: Java is missing or fails.
    """
    package = _pycocoevalcap("tokenizer.ptbtokenizer")
    command = _java("-cp", _beside(package, package.STANFORD_CORENLP_3_4_1_JAR))
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    with _starting("the PTB tokenizer"):
        run = subprocess.run(command, input="\n".join(texts), capture_output=True, encoding="utf-8")
    if run.returncode:
        raise UnavailableError(_failed("the PTB tokenizer", run.stderr))
    lines = run.stdout.split("\n")
    if len(lines) < len(texts):
        raise DataError(
            f"the PTB tokenizer gave {len(lines)} lines for {len(texts)} texts: expected texts without line breaks"
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in package.PUNCTUATIONS)
        for line in lines[: len(texts)]
    ]


def meteor(references: Sequence[Sequence[str]], hypotheses: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """METEOR 1.5 for English, normalized (Denkowski and Lavie 2014): each output against its best reference.

    The program takes about ten seconds to start, as it reads its table of paraphrases.

    Args:
        references: for each output, its references, one line each.
        hypotheses: the outputs, one line each.
        counts: [R, N], how often each of the N outputs is in each of R sets of outputs.

    Returns:
        [R], METEOR of each set, from 0 to 1: METEOR's own function of the outputs' added statistics.

    Raises:
        UnavailableError: Java is missing or fails.
    """
    with _Meteor() as program:
        rows = []
        for group, hypothesis in zip(references, hypotheses, strict=True):
            cleaned = hypothesis.replace("|||", "").replace("  ", " ")
            (statistics,) = program.ask(["SCORE", *group, cleaned], answers=1)
            rows.append(_addends(statistics))
        sums = (counts @ np.array(rows)).tolist()
        # One answer a set, and then one for all of them together.
        answers = program.ask(
            ["EVAL", *(" ".join(map(repr, row)) for row in sums)],
            answers=len(sums) + 1,
        )
    return np.array([float(answer) for answer in answers[:-1]])


def rouge_l(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """ROUGE_L of each output, from 0 to 1, over words as `tokenize` gives them. The figure is their mean.

    It weighs recall by β = 1.2 against precision, and takes the best of each over the references.
    """
    _, scores = _pycocoevalcap("rouge.rouge").Rouge().compute_score(*_captions(references, hypotheses))
    return np.asarray(scores)


def cider(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """CIDEr-D of each output, from 0 to 10, over words as `tokenize` gives them. The figure is their mean.

    An n-gram weighs the more, the fewer outputs have it in their references: of one output alone all is 0.

    Raises:
        DataError: no reference has a word.
    """
    if not any(any(group) for group in references):
        raise DataError("no reference has a word but punctuation: CIDEr has nothing to count")
    _, scores = _pycocoevalcap("cider.cider").Cider().compute_score(*_captions(references, hypotheses))
    return np.asarray(scores)


def _captions(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    return (
        {i: list(group) for i, group in enumerate(references)},
        {i: [text] for i, text in enumerate(hypotheses)},
    )


def _pycocoevalcap(part: str) -> ModuleType:
    return require(f"pycocoevalcap.{part}", "pycocoevalcap")


def _beside(module: ModuleType, name: str) -> str:
    assert module.__file__ is not None
    return str(Path(module.__file__).with_name(name))


def _addends(statistics: str) -> list[float]:
    """METEOR's 23 statistics of one output as it adds them up: lengths and function words of output and
    reference, four numbers of matches for each of four stages, chunks, matched words of both.

    A chunk is a break in the order of words. An output that matches its reference from end to end has none,
    and its one chunk is not added.
    """
    row = [float(number) for number in statistics.split()]
    if sum(row[4:20:2]) == row[0] and sum(row[5:20:2]) == row[1] and row[20] == 1:
        row[20] = 0.0
    return row


def _java(*arguments: str) -> list[str]:
    program = shutil.which("java")
    if program is None:
        raise UnavailableError(
            "this needs Java (8 or later), and no `java` is on the PATH: install a Java runtime, "
            "for example by `apt install default-jre-headless`"
        )
    # Numbers are printed and read as 0.5, and letters lowered as in English, whatever the locale.
    return [program, "-Duser.language=en", "-Duser.country=US", *arguments]


def _failed(program: str, log: str) -> str:
    first = next((line.strip() for line in log.splitlines() if line.strip()), "it said nothing")
    return f"{program} stopped: {first} (it needs Java 8 or later, and METEOR 2 GB of memory)"


@contextmanager
def _starting(program: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # a `java` that is none, or no memory for a process
        raise UnavailableError(_failed(program, str(error))) from None


class _Meteor:
    """The METEOR program, answering lines of `COMMAND ||| field ||| field`."""

    def __enter__(self) -> _Meteor:
        package = _pycocoevalcap("meteor.meteor")
        command = _java("-Xmx2G", "-jar", _beside(package, package.METEOR_JAR))
        self.log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        with _starting("METEOR"):
            self.process = subprocess.Popen(
                [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                encoding="utf-8",
            )
        return self

    def ask(self, fields: Sequence[str], answers: int) -> list[str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(" ||| ".join(fields) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the program has ended: there are no answers to read, which is reported below
        lines = [self.process.stdout.readline() for _ in range(answers)]
        if not lines[-1]:
            self.process.wait()
            self.log.seek(0)
            raise UnavailableError(_failed("METEOR", self.log.read()))
        return lines

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()
