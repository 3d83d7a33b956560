"""Figures of outputs against references, with signatures and bootstrap intervals.

The metrics are in `metrics`. A bootstrap draws inputs anew, with their references and outputs: as many as there are,
with replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foreword.coco import UnavailableError
from foreword.errors import DataError, MissingExtraError, SettingsError
from foreword.metrics import Texts, chosen
from foreword.reading import text_of

__all__ = [
    "Comparison",
    "Scores",
    "paired_bootstrap",
    "read_outputs",
    "read_references",
    "score",
    "score_files",
    "score_groups",
]

SEED = 12345
"""Of every bootstrap, unless another is given: sacrebleu's own."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `score` found.

    Args:
        figures: by the metric's name.
        signatures: by the metric's name: program or library, version and settings, to go with the figure.
        missing: by the metric's name: in one line, why there is no figure.
        intervals: by the metric's name: low and high end of the 95% interval; empty without a bootstrap.
    """

    figures: dict[str, float]
    signatures: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems' figures on the same references.

    Args:
        baseline: the figure of the baseline's outputs.
        system: the figure of the other system's outputs.
        interval: low and high end of the 95% interval of `system - baseline`.
        p_value: how often chance alone gives a difference as large, of either sign.
        signature: program or library, version and settings.
    """

    baseline: float
    system: float
    interval: tuple[float, float]
    p_value: float
    signature: str


def read_outputs(path: str | Path) -> list[str]:
    """Outputs from a text file, one a line. A blank line is a blank output.

    Raises:
        DataError: no such file, not UTF-8, or empty.
    """
    return [line.strip() for line in _lines(path)]


def read_references(path: str | Path) -> list[list[str]]:
    """References from a text file: one a line, with a blank line between those of one output and the next.

    Returns:
        For each output its references, at least one.

    Raises:
        DataError: no such file, not UTF-8, nothing in it, or an output without a reference.
    """
    lines = [line.strip() for line in _lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path} is blank: expected references, one a line")
    groups: list[list[str]] = [[]]
    for number, line in enumerate(lines, start=1):
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
        else:
            raise DataError(
                f"{path}, line {number}: an output without a reference: "
                "expected one blank line, and no more, between the references of one output and the next"
            )
    return groups


def score_files(
    references: str | Path,
    outputs: str | Path,
    metrics: str | Sequence[str] = "e2e",
) -> Scores:
    """`score` of two files, in the formats of `read_references` and `read_outputs`.

    A references file without blank lines that has as many lines as there are outputs holds one reference for
    each.

    Raises:
        DataError: as the two readers and `score`, or references for another number of outputs.
    """
    groups, hypotheses = read_references(references), read_outputs(outputs)
    if len(groups) == 1 and len(groups[0]) == len(hypotheses):
        groups = [[reference] for reference in groups[0]]
    if len(groups) != len(hypotheses):
        raise DataError(
            f"{references} has references for {len(groups)} outputs, but {outputs} has {len(hypotheses)}: "
            "expected one output a line, and a blank line between the references of one output and the next"
        )
    return score(groups, hypotheses, metrics)


def score(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    metrics: str | Sequence[str] = "e2e",
    *,
    samples: int = 0,
    seed: int = SEED,
) -> Scores:
    """Figures of outputs against their references.

    Args:
        references: for each output its references, at least one; their numbers may differ.
        hypotheses: the outputs.
        metrics: suites (`e2e`), figures (`chrF`) and figures of a suite (`webnlg.BLEU`), as a list or with commas
            between them.
        samples: sets of outputs drawn for the intervals, say 1000; 0 for no intervals.
        seed: of the draws.

    Returns:
        Figures, signatures and intervals; a metric whose package, Java or model is not there is in `missing`
        instead.

    Raises:
        DataError: no outputs, another number of references than of outputs, or a blank reference.
        SettingsError: a metric that does not exist, or two of one name.
    """
    groups = {"all": range(len(hypotheses))}
    return score_groups(references, hypotheses, groups, metrics, samples=samples, seed=seed)["all"]


def score_groups(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    metrics: str | Sequence[str] = "e2e",
    *,
    runs: int = 1,
    samples: int = 0,
    seed: int = SEED,
) -> dict[str, Scores]:
    """Figures of groups of outputs, such as the categories of a data set; an output may be in several.

    The texts are looked at once, and each group's statistics added up. NIST's and CIDEr's weights, which they learn
    from references, come from those of all the outputs.

    Args:
        references, hypotheses, metrics, samples, seed: as `score` takes them.
        groups: by name, the places of the group's inputs among `references`; at least one each.
        runs: whose outputs are in `hypotheses`, one run after the other, each in the order of `references`. They are
            scored together, and an input that is drawn is so with the outputs of all runs: those are not independent.

    Returns:
        For each group what `score` gives.

    Raises:
        DataError, SettingsError: as `score`.
    """
    measures = chosen(metrics)
    texts = Texts([*references] * runs, hypotheses)
    inputs = len(references)
    counts = np.concatenate([_draws(inputs, runs, samples, seed, np.asarray(places)) for places in groups.values()])
    scores = {name: Scores(figures={}, signatures={}) for name in groups}
    for metric, measure in measures.items():
        try:
            values, signature = measure(texts, counts)
        except (MissingExtraError, UnavailableError) as error:
            for one in scores.values():
                one.missing[metric] = str(error)
            continue
        for one, (value, *drawn) in zip(scores.values(), values.reshape(len(groups), -1), strict=True):
            one.figures[metric] = float(value)
            one.signatures[metric] = signature
            if samples:
                one.intervals[metric] = _interval(np.array(drawn))
    return scores


def paired_bootstrap(
    references: Sequence[Sequence[str]],
    baseline: Sequence[str],
    system: Sequence[str],
    metrics: str | Sequence[str] = "BLEU",
    *,
    runs: int = 1,
    samples: int = 1000,
    seed: int = SEED,
) -> dict[str, Comparison]:
    """Two systems' outputs, compared on the same draws (Koehn 2004).

    The draws are sacrebleu's. The p-value is two-sided, p = mean(|d_b - mean(d)| >= |d|) over the draws' differences
    d_b, with the one that is seen, d, counted as a draw. sacrebleu centres |d_b| instead, which is a test of one side:
    of systems that do not differ, it calls one in nine different at p < 0.05.

    Args:
        references: for each input its references.
        baseline: the outputs of one system.
        system: the outputs of the other.
        metrics: as for `score`.
        runs: of each system, as for `score_groups`.
        samples: sets of outputs drawn, 1 or more.
        seed: of the draws.

    Returns:
        By the metric's name.

    Raises:
        ForewordError: as `score`; also where a metric's package, Java or model is not there.
    """
    measures = chosen(metrics)
    if samples < 1:
        raise SettingsError(f"samples is {samples}: expected 1 or more for a paired bootstrap, say 1000")
    first, second = (Texts([*references] * runs, outputs) for outputs in (baseline, system))
    counts = _draws(len(references), runs, samples, seed, np.arange(len(references)))
    compared = {}
    for name, measure in measures.items():
        before, signature = measure(first, counts)
        after, _ = measure(second, counts)
        difference = after - before
        drawn = difference[1:]
        beyond = int((np.abs(drawn - drawn.mean()) >= abs(difference[0])).sum())
        compared[name] = Comparison(
            baseline=float(before[0]),
            system=float(after[0]),
            interval=_interval(drawn),
            p_value=(beyond + 1) / (samples + 1),
            signature=f"{signature}|bs:{samples}|seed:{seed}",
        )
    return compared


def _draws(inputs: int, runs: int, samples: int, seed: int, group: np.ndarray) -> np.ndarray:
    """[samples + 1, runs x inputs]: how often each output is there; first the group's once, then in each draw of them."""
    if samples < 0:
        raise SettingsError(f"samples is {samples}: expected 0 for no intervals, or more, say 1000")
    counts = np.zeros((samples + 1, inputs))
    counts[0, group] = 1
    drawn = np.random.default_rng(seed).choice(len(group), size=(samples, len(group)), replace=True)
    for row, indices in zip(counts[1:], drawn, strict=True):
        row[group] = np.bincount(indices, minlength=len(group))
    return np.tile(counts, runs)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return low, high


def _lines(path: str | Path) -> list[str]:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    lines = text_of(data, path).splitlines()
    if not lines:
        raise DataError(f"{path} is empty: expected one text a line")
    return lines
