"""The commands for the field's tasks: prepare data, generate and score, and the recipes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from foreword import terminal as t
from foreword.settings import GenerateSettings
from foreword.terminal import err, out, shown
from foreword.writing import check_apart

if TYPE_CHECKING:
    from foreword.evaluate import Scores

__all__ = ["evaluate", "prepare", "recipes", "score", "with_recipe"]

Task = "e2e, webnlg, dart or summarization."
RecipeName = Annotated[
    str | None, typer.Option(help="Settings by name, see `foreword recipes`; what is given beside it wins.")
]


def prepare(
    task: Annotated[str, typer.Argument(help=Task)],
    source: Annotated[str, typer.Argument(help="A file, a folder, or hub:NAME.")],
    out_file: Annotated[Path, t.to_write("--out", help="JSONL to write.")],
    split: Annotated[str | None, typer.Option(help="train, dev or test, where the source has several.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a hub data set.")] = None,
) -> None:
    """Turn a field's data set into rows to train on."""
    from foreword import tasks

    out.print(shown(str(tasks.prepare(task, source, out_file, split=split, config=config))))


def score(
    references: Annotated[Path, typer.Option(help="One reference a line; a blank line between outputs.")],
    outputs: Annotated[Path, typer.Option("--outputs", "--hypotheses", help="One output a line.")],
    metrics: Annotated[str, typer.Option(help="e2e, webnlg, rouge, or names with commas.")] = "e2e",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Score outputs with the field's official metrics."""
    from foreword.evaluate import score_files

    scores = score_files(references, outputs, metrics)
    _say_missing(scores)
    if as_json:
        typer.echo(json.dumps(dict(scores.figures), indent=2))
    elif scores.figures:
        table = Table("metric", "score", box=None)
        for name, value in scores.figures.items():
            table.add_row(name, f"{value:.4f}")
        out.print(table)
        _print_signatures(scores)
    if not scores.figures:
        raise typer.Exit(2)


def evaluate(
    base: t.BaseName,
    prefix: Annotated[Path, typer.Option(help="A prefix file.")],
    task: Annotated[str, typer.Option(help=Task)],
    data: Annotated[str, typer.Option(help="A file, a folder, or hub:NAME, as for prepare; or what prepare wrote.")],
    context: typer.Context,
    recipe: RecipeName = None,
    split: Annotated[str | None, typer.Option(help="train, dev or test, where the data has several.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many inputs; by default all.")] = None,
    metrics: Annotated[str | None, typer.Option(help="As for score; by default the task's own.")] = None,
    outputs: Annotated[
        Path | None, t.to_write(help="JSONL that keeps the outputs; by default PREFIX.TASK.outputs.jsonl.")
    ] = None,
    num_beams: Annotated[int, typer.Option(help="Beams; 1 for none.")] = 5,
    length_penalty: Annotated[
        float, typer.Option(help="Of beams; above 0 favours long texts.")
    ] = GenerateSettings.length_penalty,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows through the base at once.")] = GenerateSettings.batch_size,
    samples: Annotated[int, typer.Option(min=0, help="Draws of the bootstrap; 0 for no intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 12345,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs of another evaluation.")] = False,
    as_json: t.AsJson = False,
    dtype: t.Dtype = "auto",
    device: t.Device = None,
) -> None:
    """Generate a task's texts with a prefix and score them with its official metrics, for each category too.

    Outputs are kept: a killed evaluation goes on where it was, and a finished one is scored again at once.
    """
    from foreword import tasks
    from foreword.bases import Base, load_base
    from foreword.evaluate import score_groups
    from foreword.metrics import chosen
    from foreword.outputs import part_of
    from foreword.prefix import Prefix
    from foreword.tasks import evaluation

    # whatever can be wrong is looked at before the base, which may be large, is loaded
    options = with_recipe(context, locals())
    generation = {name: options[name] for name in ("num_beams", "length_penalty", "max_new_tokens")}
    settings = GenerateSettings(**generation, batch_size=batch_size)
    loaded = Prefix.load(prefix)
    examples, report = tasks.read(task, data, split=split, config=config)
    metrics = metrics or evaluation.METRICS[task]
    chosen(metrics)
    examples = examples[:limit]
    outputs = outputs or prefix.with_name(f"{prefix.stem}.{task}.outputs.jsonl")
    for written in (outputs, part_of(outputs)):
        check_apart(written, prefix, *tasks.files(task, data, split=split))

    def frozen() -> Base:
        return load_base(base, dtype=dtype, device=device)

    with t.told_if_interrupted(), t.bar() as bar:
        shown_as = bar.add_task(f"generating {outputs.name}", total=len(examples))
        texts = evaluation.outputs_of(
            frozen,
            loaded,
            examples,
            settings,
            outputs,
            identity=(dtype,),
            overwrite=overwrite,
            on_rows=lambda n: bar.advance(shown_as, n),
        )
    groups = evaluation.groups_of(task, examples)
    scores = score_groups([one.references for one in examples], texts, groups, metrics, samples=samples, seed=seed)
    whole = scores["all"]
    _say_missing(whole)
    if as_json:
        facts = {
            "task": task,
            "data": data,
            "split": split,
            "limit": limit,
            "prefix": prefix.name,
            "base": loaded.card.base,
            "generation": generation,
            "samples": samples,
            "signatures": whole.signatures,
            "missing": whole.missing,
            "scores": {
                name: {"rows": len(groups[name]), "figures": one.figures, "intervals": one.intervals}
                for name, one in scores.items()
            },
        }
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        taken = "" if len(examples) == report.kept else f"; the first {len(examples):,} of them taken"
        out.print(shown(f"{report}{taken}; outputs in {outputs}"))
        _print_groups(scores, groups)
    if not whole.figures:
        raise typer.Exit(2)


def _say_missing(scores: Scores) -> None:
    for reason in dict.fromkeys(scores.missing.values()):
        names = ", ".join(name for name, why in scores.missing.items() if why == reason)
        err.print(f"{shown(names)}: {shown(reason)}")


def _print_groups(scores: Mapping[str, Scores], groups: Mapping[str, Sequence[int]]) -> None:
    names = list(scores["all"].figures)
    table = Table("", "inputs", *names, box=None)
    for group, one in scores.items():
        cells = []
        for name in names:
            low_high = one.intervals.get(name)
            interval = "" if low_high is None else f" [{low_high[0]:.3f}, {low_high[1]:.3f}]"
            cells.append(shown(f"{one.figures[name]:.4f}{interval}"))
        table.add_row(shown(group), f"{len(groups[group]):,}", *cells)
    wide = out.options.update(width=10_000)
    for column in table.columns:
        # no word is cut: on a narrow screen the table is wider than it
        column.min_width = max(out.measure(cell, options=wide).minimum for cell in (column.header, *column.cells))
    out.print(table)
    _print_signatures(scores["all"])


def _print_signatures(scores: Scores) -> None:
    for name, signature in scores.signatures.items():
        out.print(shown(f"{name}: {signature}"))


def recipes() -> None:
    """List the recipes of `train --recipe`: settings by name, and where they are from."""
    from foreword.recipes import RECIPES

    for name, one in RECIPES.items():
        out.print(f"[bold]{name}[/]")
        for what, options in (("train", one.options), ("evaluate", one.generation)):
            flags = " ".join(
                f"--{option.replace('_', '-')} {shlex.quote(str(value))}" for option, value in options.items()
            )
            out.print(f"  {what:8} {flags}")
        out.print(f"  {'source':8} {shown(one.source)}")


def with_recipe(context: typer.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `train` or `evaluate`, with a recipe's where the user gave none.

    Those of the recipe that exclude what the user gave fall away.
    """
    if options["recipe"] is None:
        return dict(options)
    from foreword.recipes import recipe

    def given(option: str) -> bool:
        source = context.get_parameter_source(option)
        return source is not None and source.name != "DEFAULT"

    chosen = recipe(options["recipe"])
    table = chosen.generation if "num_beams" in options else chosen.options
    wanted = {option: value for option, value in table.items() if not given(option)}
    if given("reparametrization") and options["reparametrization"] != table.get("reparametrization"):
        wanted.pop("hidden", None)
        wanted.pop("lr", None)
    if given("init_text") or given("init_from"):
        wanted.pop("init", None)
    if given("init") or given("init_from"):
        wanted.pop("init_text", None)
    if given("init_from"):
        wanted.pop("length", None)
    return {**options, **wanted}
