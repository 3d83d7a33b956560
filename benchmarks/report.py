"""What a study found, as NAME.md, NAME.json and NAME.svg beside its runs. An unfinished study is reported as far as it is."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import write_json
from benchmarks.study import RESULTS, Line, Study, compare, lines, todo
from foreword.writing import write_atomically


def report(study: Study, *, command: str) -> str:
    """Write the files; returns the markdown."""
    found = lines(study)
    contrasts = compare(study, found)
    left = todo(study)
    text = markdown(study, found, contrasts, [unit.name for unit in left], command)
    facts = {
        "study": study.full_name,
        "command": command,
        "unfinished": [unit.name for unit in left],
        "settings": dict(study.settings),
        "lines": [facts_of(line) for line in found],
        "contrasts": contrasts,
        "published": [{"name": name, **figures} for name, figures in study.published],
        "differs": study.differs,
    }
    with write_atomically(RESULTS / f"{study.full_name}.md") as aside:
        aside.write_text(text, encoding="utf-8")
    write_json(RESULTS / f"{study.full_name}.json", facts)
    if any(line.runs for line in found):
        plot(study, [line for line in found if line.runs])
    return text


def facts_of(line: Line) -> dict[str, Any]:
    return {
        "arm": line.arm.name,
        "method": line.arm.method,
        "rows": line.arm.rows,
        "epochs": line.arm.epochs,
        "learning_rate": line.lr,
        "at_the_edge": line.edge,
        "parameters": line.parameters,
        "runs": len(line.runs),
        "diverged": line.diverged,
        "train_seconds": [round(run["train_seconds"], 1) for run in line.runs],
        "values": line.values,
        "groups": {
            name: {"figures": one.figures, "intervals": one.intervals, "missing": one.missing}
            for name, one in line.scores.items()
        },
    }


def markdown(
    study: Study, found: Sequence[Line], contrasts: Sequence[dict[str, Any]], left: Sequence[str], command: str
) -> str:
    parts = [f"# {study.title}", f"`{command}`"]
    if left:
        parts.append(
            f"**Unfinished**: runs that can be made now and are not there: {len(left)}, the first `{left[0]}`; the same command "
            "goes on. What follows is of the finished ones alone."
        )
    if study.cut:
        parts.append(f"Cut down to fit: {study.cut}")
    if not found:
        return "\n\n".join([*parts, "No arm has a finished run at a chosen learning rate yet."]) + "\n"
    names = list(dict.fromkeys(name for line in found for name in line.scores["all"].figures))
    header = ["", "rows", "keeps", "lr", "runs", f"{study.primary}, mean (low to high)", *names]
    for group in found[0].scores:
        rows = []
        for line in found:
            scores = line.scores[group]
            cells = [
                f"{scores.figures[name]:.4f} [{scores.intervals[name][0]:.4f}, {scores.intervals[name][1]:.4f}]"
                if name in scores.figures
                else "–"
                for name in names
            ]
            values = line.values
            spread = (
                f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
                if values and group == "all"
                else "–"
            )
            rows.append(
                [
                    line.arm.name,
                    str(line.arm.rows),
                    f"{line.parameters:,}",
                    f"{line.lr:g}{' (edge)' if line.edge else ''}",
                    f"{len(values)}{f' ({line.diverged} diverged)' if line.diverged else ''}",
                    spread,
                    *cells,
                ]
            )
        parts += [f"## Test inputs: {group}" if len(found[0].scores) > 1 else "## Figures", table(header, rows)]
    missing = {name: why for line in found for name, why in line.scores["all"].missing.items()}
    parts += [f"{name} is missing: {why}" for name, why in missing.items()]
    parts.append("In brackets: 95% bootstrap intervals over test inputs, each with the outputs of all its runs.")
    if any(line.diverged for line in found):
        parts.append("Runs that diverged have no outputs: all figures are of the others.")
    if any(line.edge for line in found):
        parts.append(
            "(edge): of the learning rates tried this is the least or the greatest; a better one may lie beyond."
        )
    if contrasts:
        rows = [
            [
                f"{one['system']} – {one['baseline']}",
                one["group"],
                str(one["runs"]),
                f"{one['difference']:+.4f} [{one['interval'][0]:+.4f}, {one['interval'][1]:+.4f}]",
                f"{one['p_value']:.3f}",
            ]
            for one in contrasts
        ]
        parts += ["## Differences", table(["", "inputs", "runs", f"{study.primary} [95%]", "p"], rows)]
        parts.append(
            "Paired bootstrap over test inputs, each with the outputs of all its runs; p is two-sided. It does not see the "
            "chance in samples and seeds."
        )
    if study.expected:
        parts += ["What the paper lets us expect:", "\n".join(f"- {one}" for one in study.expected)]
    if study.published:
        figures = list(dict.fromkeys(name for _, row in study.published for name in row))
        rows = [[name, *(f"{row[f]:g}" if f in row else "–" for f in figures)] for name, row in study.published]
        parts += ["## The paper's figures (Li & Liang 2021)", table(["", *figures], rows)]
    if study.differs:
        parts.append(f"What differs: {study.differs}")
    run = next((run for line in found for run in line.runs), None)
    if run is not None:
        base = Path(study.base).name if Path(study.base).is_absolute() else study.base
        parts.append(
            f"Ours: base `{base}` in {run['dtype']}, {run['machine']['threads']} threads, torch {run['machine']['torch']}, "
            f"batches of {study.batch_size} rows, {'greedy' if study.beams == 1 else f'beams {study.beams}'}."
        )
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def plot(study: Study, found: Sequence[Line]) -> None:
    """Curves where arms are points of them, else a bar an arm; whiskers are the 95% intervals."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: this needs the package 'matplotlib': pip install 'foreword[bench]'", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = study.full_name  # else the same figures give another file each time
    from matplotlib import pyplot

    groups = list(found[0].scores)
    curves = dict.fromkeys(line.arm.line for line in found if line.arm.line is not None)
    figure, axes = pyplot.subplots(1, len(groups), figsize=(5.5 * len(groups), 4), squeeze=False, sharey=True)
    # the figure's name without its suite, as scores have it
    name = study.primary.rpartition(".")[2]
    for axis, group in zip(axes[0], groups, strict=True):
        if curves:
            for curve in curves:
                points = sorted((line for line in found if line.arm.line == curve), key=lambda line: line.arm.x or 0)
                xs = [line.arm.x for line in points]
                axis.errorbar(xs, *whiskers(points, group, name), marker="o", capsize=3, label=curve)
            axis.set_xlabel(study.x_label)
            axis.set_xscale("log")
            axis.set_xticks(sorted({line.arm.x for line in found if line.arm.x is not None}))
            axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axis.minorticks_off()
            axis.legend()
        else:
            values, errors = whiskers(found, group, name)
            axis.barh([line.arm.name for line in found], values, xerr=errors, capsize=3, color="#7a9cc6")
            axis.set_xlabel(name)
        if len(groups) > 1:
            axis.set_title(group, fontsize=9)
    if curves:
        axes[0][0].set_ylabel(name)
    else:
        axes[0][0].invert_yaxis()  # the first arm on top, in every group: they share the axis
    figure.suptitle(study.title, fontsize=10)
    figure.tight_layout()
    with write_atomically(RESULTS / f"{study.full_name}.svg") as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def whiskers(found: Sequence[Line], group: str, name: str) -> tuple[list[float], list[list[float]]]:
    """The values, and how far each one's interval reaches below and above."""
    values = [line.scores[group].figures[name] for line in found]
    ends = [line.scores[group].intervals[name] for line in found]
    below = [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)]
    return values, [below, above]
