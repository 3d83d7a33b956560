"""What the commands of the command line share: how options are typed, and how things are shown."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from foreword.errors import SettingsError
from foreword.settings import TrainSettings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState

    from foreword.prefix import Framing, Prefix

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

# options, as commands take them; their defaults stand with the commands


def _home(path: Path | None) -> Path | None:
    # pathlib's own fails where nobody is called so
    return None if path is None else Path(os.path.expanduser(path))


def to_write(*names: str, help: str) -> Any:
    """An option for what is to be written. ~ is the home folder: a shell leaves it alone after an = sign."""
    return typer.Option(*names, help=help, callback=_home)


OutFile = Annotated[Path, to_write("--out", help="The prefix file to write.")]
BaseName = Annotated[str, typer.Option("--base", help="Hub id, folder, .gguf file, or the built-in smollm2-135m.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: bfloat16 where the processor has it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default cuda where there is one.")]
Input = Annotated[str, typer.Option(help="Column of x.")]
Output = Annotated[str, typer.Option(help="Column of y.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="How x is made of a row's columns; \\n is a line break. By default as --init-from, or '{input}\\n'."
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Rows have messages, framed by the base's chat template.")]
MaxInputTokens = Annotated[int | None, typer.Option(min=1, help="Cut a longer x.")]
MaxOutputTokens = Annotated[int | None, typer.Option(min=1, help="Cut a longer y.")]
Length = Annotated[int, typer.Option(help="Virtual tokens.")]
Reparametrization = Annotated[str, typer.Option(help="mlp, direct, or embedding.")]
Hidden = Annotated[int | None, typer.Option(min=1, help="Hidden size of the MLP.")]
Init = Annotated[str, typer.Option(help="activations (of the first rows) or random.")]
InitText = Annotated[str | None, typer.Option(help="Words of the task, whose activations start the prefix.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate; by default 0.001 mlp, 0.05 direct, 0.02 embedding.")
]
Epochs = Annotated[int, typer.Option(help="Passes over the rows.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps in which the learning rate grows.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's.")]
Patience = Annotated[int, typer.Option(help="Stop after so many epochs without a lower development loss; 0: never.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")]
Seed = Annotated[int, typer.Option(help="Of all that is random.")]
SaveDtype = Annotated[str, typer.Option(help="Of the file: bfloat16 or float32.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings_of(options: Mapping[str, Any]) -> TrainSettings:
    """The settings among a command's options."""
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    return TrainSettings(**{name: value for name, value in options.items() if name in names})


def framing_of(
    template: str | None, chat: bool, max_input_tokens: int | None, init_from: Prefix | None = None
) -> Framing:
    from foreword.prefix import Framing

    if chat and template is not None:
        raise SettingsError("--chat and --template exclude each other: the chat template frames x")
    if init_from is not None and template is None and not chat:
        learnt = init_from.card.framing
        return dataclasses.replace(learnt, max_input_tokens=max_input_tokens or learnt.max_input_tokens)
    return Framing(
        template=Framing.template if template is None else typed(template),
        chat=chat,
        max_input_tokens=max_input_tokens,
    )


def typed(text: str) -> str:
    """What a template or a stop string means as it is typed: the shell gives no line breaks and tabs."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def file_dtype(name: str) -> torch.dtype:
    import torch

    if name not in ("bfloat16", "float32"):
        raise SettingsError(f"expected bfloat16 or float32 for the file; got {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def on_cpu(device: str | None) -> bool:
    """Whether accelerate is to take the CPU: where there is no GPU it must be told, or sees no other process."""
    import torch

    return device == "cpu" or (device is None and not torch.cuda.is_available())


def device_of(device: str | None, state: PartialState | Accelerator) -> str | None:
    """The device for the base: that of this process where a launcher started several, unless one by name was asked for.

    Raises:
        SettingsError: fewer processes know of each other than the launcher started; each would do all the work.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes < started:
        raise SettingsError(
            f"the launcher started {started} processes, and this one sees {state.num_processes}: name --device"
        )
    return str(state.device) if state.num_processes > 1 and device in (None, "cuda") else device


@contextmanager
def told_if_interrupted(how: str = "the same command again goes on where it was") -> Iterator[None]:
    """Say on Ctrl-C how a command that keeps what it has done goes on."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"interrupted: {how}")
        raise


def shown(text: str) -> str:
    """Text that may be a stranger's, with nothing in it that the terminal or rich would act on."""
    return escape("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


def bar(*columns: ProgressColumn, count: ProgressColumn | None = None) -> Progress:
    """A progress bar on stderr; `count` stands in the place of how many are done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        count or MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=err,
        # in a log it would be a line of its own, beside that of an error
        disable=not err.is_terminal,
    )


def show_prefix(prefix: Prefix, title: str, facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a prefix's card and its tensors say, after some other facts."""
    facts = {**prefix.facts, **facts, **json.loads(prefix.card.to_json())}
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    out.print(f"[bold]{shown(title)}[/]")
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, dict):
            lines = [f"{key}: {item!r}" if isinstance(item, str) else f"{key}: {item}" for key, item in value.items()]
        elif isinstance(value, list):
            lines = ["  ".join(item.values()) for item in value]
        else:
            lines = [str(value)]
        for label, line in zip_longest((name,), lines, fillvalue=""):
            out.print(shown(f"{label:{width}}  {line}"))
