"""The command line: parse, call, print. A user's mistake is one line and exit code 2."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import io
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import TextColumn

from foreword import cli_hub, cli_many, cli_serve, cli_tasks
from foreword import terminal as t
from foreword.errors import ForewordError, MissingExtraError, SettingsError, one_line, out_of_memory
from foreword.settings import GenerateSettings, TrainSettings
from foreword.terminal import err, out, shown
from foreword.version import __version__
from foreword.writing import check_apart, check_new

__all__ = ["app", "main"]

app = typer.Typer(
    name="foreword",
    help="Train, keep and use prefixes over one frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_many.store_app, name="store")
app.add_typer(cli_serve.keys_app, name="keys")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

TRACKERS = ("tensorboard", "trackio", "wandb")
"""Those of accelerate's trackers that the extra `trackers` installs; `foreword.train` takes any."""


def main() -> None:
    """Run the command line; the exit code is 2 for what the user can mend, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is
    try:
        app(prog_name="foreword")
    except (ForewordError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
            if error.errno in FULL:
                message += ": what was there is unchanged; make room, and run this again"
        _end(message)
    except UnicodeEncodeError as error:
        _end(f"expected Unicode text; got a lone surrogate, {error.object[error.start]!a}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _end("the memory does not suffice: take smaller batches, fewer beams, or a shorter prefix or text")


def _end(message: str) -> NoReturn:
    err.print(f"[bold red]error:[/] {shown(' '.join(message.split()))}")
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def train(
    base: t.BaseName,
    data: Annotated[Path, typer.Option(help="JSONL, CSV or TSV with the columns input and output, or messages.")],
    out_file: Annotated[Path, t.to_write("--out", help="The prefix file, .safetensors.")],
    context: typer.Context,
    recipe: cli_tasks.RecipeName = None,
    dev: Annotated[Path | None, typer.Option(help="Development rows: the prefix with the lowest loss is kept.")] = None,
    input: t.Input = "input",
    output: t.Output = "output",
    template: t.Template = None,
    chat: t.Chat = False,
    max_input_tokens: t.MaxInputTokens = None,
    max_output_tokens: t.MaxOutputTokens = TrainSettings.max_output_tokens,
    length: t.Length = TrainSettings.length,
    reparametrization: t.Reparametrization = TrainSettings.reparametrization,
    hidden: t.Hidden = TrainSettings.hidden,
    init: t.Init = TrainSettings.init,
    init_text: t.InitText = TrainSettings.init_text,
    init_from: Annotated[Path | None, typer.Option(help="A saved prefix to go on from; its length stays.")] = None,
    lr: t.LearningRate = TrainSettings.lr,
    epochs: t.Epochs = TrainSettings.epochs,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch, on each process.")] = TrainSettings.batch_size,
    accumulation: Annotated[int, typer.Option(help="Such batches to one step.")] = TrainSettings.accumulation,
    warmup: t.Warmup = TrainSettings.warmup,
    clip: t.Clip = TrainSettings.clip,
    weight_decay: t.WeightDecay = TrainSettings.weight_decay,
    patience: t.Patience = TrainSettings.patience,
    gradient_checkpointing: t.Checkpointing = TrainSettings.gradient_checkpointing,
    seed: t.Seed = TrainSettings.seed,
    save_dtype: t.SaveDtype = "bfloat16",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of a killed run, if there is one.")
    ] = False,
    overwrite: t.Overwrite = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    log_with: Annotated[str | None, typer.Option(help="A tracker: tensorboard, trackio or wandb.")] = None,
    log_dir: Annotated[
        Path | None, t.to_write(help="Folder for the tracker's files; by default the prefix file's.")
    ] = None,
    dtype: t.Dtype = "auto",
    device: t.Device = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print how near the speed was to the machine's limit, and peak memory.")
    ] = False,
) -> None:
    """Train a prefix on one task's or one user's rows."""
    from accelerate import Accelerator

    from foreword.bases import load_base
    from foreword.checkpoint import check_out
    from foreword.data import check_records, read_records
    from foreword.learner import check_dev
    from foreword.limit import peak_memory, product_rate
    from foreword.prefix import Prefix
    from foreword.training import train as train_prefix

    options = cli_tasks.with_recipe(context, locals())
    settings = t.settings_of(options)
    file_dtype = t.file_dtype(save_dtype)
    start = None if init_from is None else Prefix.load(init_from)
    framing = t.framing_of(template, chat, options["max_input_tokens"], start)
    # whatever can be wrong is looked at before the base, which may be large, is loaded
    records = read_records(data, input=input, output=output)
    check_records(records, framing, what=f"{data}, record")
    dev_records = None
    if dev is not None:
        dev_records = read_records(dev, input=input, output=output)
        check_records(dev_records, framing, what=f"{dev}, record")
    check_dev(settings, dev_records)
    check_apart(out_file, data, dev)
    check_out(out_file, resume=resume, overwrite=overwrite)
    if log_with is not None and log_with not in TRACKERS:
        raise SettingsError(f"expected a tracker of {', '.join(TRACKERS)}; got {log_with!r}")
    if log_dir is not None and log_with is None:
        raise SettingsError(f"expected a tracker to write into --log-dir; give --log-with {'|'.join(TRACKERS)}")
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise MissingExtraError("trackers", log_with)
    try:
        accelerator = Accelerator(log_with=log_with, project_dir=log_dir or out_file.parent, cpu=t.on_cpu(device))
    except (ValueError, ImportError) as error:
        # of what its environment variables and configuration file say, DeepSpeed where there is none too
        raise SettingsError(f"accelerate refuses its settings: {one_line(error)}") from None
    device = t.device_of(device, accelerator)
    frozen = load_base(base, dtype=dtype, device=device)
    if log_with is not None:
        accelerator.init_trackers(
            "foreword",
            config={k: v for k, v in dataclasses.asdict(settings).items() if isinstance(v, int | float | str)},
        )
    bar = t.bar(TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[speed]} tokens/s"))
    bar.disable |= not accelerator.is_main_process
    began = time.perf_counter()
    last: Any = None
    with t.told_if_interrupted("the same command with --resume goes on from the last checkpoint"), bar:
        task = bar.add_task(f"training {out_file.name}", total=None, loss="–", speed="–")

        def show(progress: Any) -> None:
            nonlocal last
            last = progress
            loss = f"{progress.loss:.3f}" + ("" if progress.dev_loss is None else f" (dev {progress.dev_loss:.3f})")
            speed = f"{progress.tokens_per_second:,.0f}"
            bar.update(task, completed=progress.step, total=progress.steps, loss=loss, speed=speed)
            if bar.disable and progress.step * settings.epochs % progress.steps == 0:
                err.print(f"epoch {progress.epoch} of {settings.epochs}: loss {loss}, {speed} tokens/s")

        prefix = train_prefix(
            frozen,
            records,
            dev=dev_records,
            settings=settings,
            framing=framing,
            init_from=start,
            out=out_file,
            resume=resume,
            overwrite=overwrite,
            checkpoint_every=checkpoint_every,
            save_dtype=file_dtype,
            accelerator=accelerator,
            on_step=show if accelerator.is_main_process else None,
        )
    accelerator.end_training()
    if accelerator.is_main_process:
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in prefix.card.metrics.items())
        out.print(
            f"{shown(str(out_file))}: {prefix.length} virtual tokens, {prefix.num_parameters:,} parameters, "
            f"{out_file.stat().st_size:,} bytes; {metrics}; {time.perf_counter() - began:.0f} s"
            + ("" if last is None else f", {last.tokens_per_second:,.0f} tokens/s"),
        )
        if profile and last is not None:
            rate = (
                product_rate(frozen, round(settings.batch_size * last.tokens / last.rows)) * accelerator.num_processes
            )
            speed, limit = last.tokens_per_second, last.tokens / last.operations * rate
            out.print(
                f"profile: {speed / limit:.0%} of the limit, {speed:,.0f} of {limit:,.0f} tokens/s; {last.operations / last.tokens / 1e9:.2f} "
                f"GFLOP a token, {rate / 1e9:,.0f} GFLOP/s of bare products; peak memory {peak_memory(frozen) / 2**20:,.0f} MiB"
            )


app.command(name="train-many")(cli_many.train_many)
app.command()(cli_serve.serve)


@app.command()
def generate(
    base: t.BaseName,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Inputs, each continued.")] = None,
    prefix: Annotated[Path | None, typer.Option(help="A prefix file; without one, the bare base answers.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(help="JSONL, CSV or TSV with input or messages; a column prefix names a row's own prefix."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The store that has the prefixes of rows; by default, they are files."),
    ] = None,
    output_file: Annotated[Path | None, t.to_write("--output", help="JSONL: the rows with their output.")] = None,
    input: Annotated[str, typer.Option(help="Column of x.")] = "input",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = GenerateSettings.max_new_tokens,
    num_beams: Annotated[int, typer.Option(help="Beams; 1 for none.")] = GenerateSettings.num_beams,
    length_penalty: Annotated[
        float, typer.Option(help="Of beams; above 0 favours long texts.")
    ] = GenerateSettings.length_penalty,
    temperature: Annotated[
        float, typer.Option(help="0: the most likely token; above: sample.")
    ] = GenerateSettings.temperature,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0: all.")] = GenerateSettings.top_k,
    top_p: Annotated[
        float, typer.Option(help="Sample among the most likely with this probability together.")
    ] = GenerateSettings.top_p,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string, \\n for a line break; may be given again.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = GenerateSettings.seed,
    batch_size: Annotated[int, typer.Option(help="Rows through the base at once.")] = GenerateSettings.batch_size,
    raw: Annotated[bool, typer.Option("--raw", help="Give the base the text as it is, with no template.")] = False,
    overwrite: t.Overwrite = False,
    dtype: t.Dtype = "auto",
    device: t.Device = None,
) -> None:
    """Continue texts, or the rows of a file, with a prefix.

    Outputs of rows are kept as they come, in OUTPUT.part: the same command again goes on where it was killed.
    """
    from foreword.bases import load_base
    from foreword.data import read_records, renamed
    from foreword.generation import generate as generate_texts
    from foreword.generation import stream
    from foreword.outputs import Outputs, part_of
    from foreword.prefix import Framing, Prefix
    from foreword.store import Store

    if bool(texts) == (input_file is not None):
        raise SettingsError("expected texts, or --input-file with --output; give one of the two")
    if (input_file is None) != (output_file is None):
        raise SettingsError("--input-file and --output go together")
    if store is not None and input_file is None:
        raise SettingsError("--store has the prefixes that rows of --input-file name: give one, or --prefix FILE")
    settings = GenerateSettings(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=tuple(map(t.typed, stop or ())),
        seed=seed,
        batch_size=batch_size,
    )
    framing = Framing(template="{input}") if raw else None
    shared = None if prefix is None else Prefix.load(prefix)
    if texts:
        frozen = load_base(base, dtype=dtype, device=device)
        if len(texts) == 1 and num_beams == 1:
            stream(frozen, texts[0], shared, settings=settings, framing=framing, write=_write)
            _write("\n")
        else:
            for text in generate_texts(frozen, texts, shared, settings=settings, framing=framing):
                _write(text + "\n")
        return
    assert input_file is not None
    assert output_file is not None
    rows, names = read_records(input_file), {} if input == "input" else {input: "input"}
    records = [renamed(row, names, f"{input_file}, record {number}") for number, row in enumerate(rows, 1)]
    for written in (output_file, part_of(output_file)):
        check_apart(written, input_file, prefix)
    opened = None if store is None else Store(store)
    if store is not None and prefix is None and not any(record.get("prefix") for record in records):
        raise SettingsError(
            f"{input_file}: expected a column 'prefix' that names a prefix of the store {store}; no row has one"
        )
    named: dict[str, Prefix] = {}
    own: list[Prefix | None] = []
    for number, record in enumerate(records, 1):
        name = record.get("prefix") or None
        if name is not None and not isinstance(name, str):
            raise SettingsError(
                f"{input_file}, record {number}: expected a {'file ' if opened is None else ''}name in 'prefix'; got {name!r}"
            )
        if name is not None and name not in named:
            named[name] = Prefix.load(input_file.parent / name) if opened is None else opened.get(name)
        own.append(shared if name is None else named[name])
    with t.told_if_interrupted(), t.bar() as bar:
        task = bar.add_task(f"generating {output_file.name}", total=len(records))
        kept = Outputs(
            output_file,
            records,
            own,
            settings=settings,
            framing=framing,
            identity=(base, dtype),
            overwrite=overwrite,
            on_rows=lambda n: bar.advance(task, n),
        )
        check_new(output_file, overwrite=overwrite or kept.whole)
        made = kept.generate(lambda: load_base(base, dtype=dtype, device=device))
    kept.finish({**row, "output": text} for row, text in zip(rows, made, strict=True))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A prefix file.")],
    as_json: t.AsJson = False,
) -> None:
    """Print a prefix file's card."""
    from foreword.prefix import Prefix

    t.show_prefix(Prefix.load(file), file.name, {"bytes": file.stat().st_size}, as_json=as_json)


@app.command(name="import-peft")
def import_peft(
    folder: Annotated[Path, typer.Argument(help="PEFT's folder, with adapter_config.json.")],
    base: t.BaseName,
    out_file: t.OutFile,
    template: Annotated[str | None, typer.Option(help="How x was framed in training; PEFT doesn't say.")] = None,
    chat: t.Chat = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Make a prefix file of a PEFT prefix-tuning checkpoint."""
    from foreword.bases import load_base
    from foreword.checkpoint import check_out
    from foreword.data import fields_of
    from foreword.interop import peft

    check_out(out_file, resume=None, overwrite=overwrite)
    framing = t.framing_of(template, chat, max_input_tokens=None)
    fields_of(framing.template)
    prefix = peft.import_peft(folder, load_base(base, device="cpu"), framing=framing)
    prefix.save(out_file, t.file_dtype("float32"))
    out.print(f"{shown(str(out_file))}: {prefix.length} virtual tokens")


@app.command(name="export-peft")
def export_peft(
    file: Annotated[Path, typer.Argument(help="A prefix file.")],
    base: t.BaseName,
    out_folder: Annotated[Path, t.to_write("--out", help="The folder to write, for PeftModel.from_pretrained.")],
) -> None:
    """Make a PEFT checkpoint of a prefix file."""
    from foreword.bases import load_base
    from foreword.interop import peft
    from foreword.prefix import Prefix

    prefix = Prefix.load(file)
    peft.export_peft(prefix, load_base(base, device="cpu"), out_folder)
    out.print(shown(str(out_folder)))


for _command in (
    *(cli_tasks.prepare, cli_tasks.evaluate, cli_tasks.score, cli_tasks.recipes),
    *(cli_hub.card, cli_hub.push, cli_hub.pull),
):
    app.command()(_command)
