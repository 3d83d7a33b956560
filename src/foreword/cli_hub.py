"""The commands for the Hugging Face hub: a prefix's model card, and the file there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword import terminal as t
from foreword.errors import DataError, SettingsError
from foreword.reading import text_of
from foreword.terminal import err, out, shown
from foreword.writing import check_apart, check_new, write_atomically

if TYPE_CHECKING:
    from foreword.prefix import Prefix

__all__ = ["card", "pull", "push"]

PrefixFile = Annotated[Path, typer.Argument(metavar="P.safetensors", help="A prefix file.")]
Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository of the hub.")]
Licence = Annotated[
    str | None, typer.Option("--license", "--licence", help="The prefix's, as the hub has it: cc-by-sa-4.0.")
]
Language = Annotated[list[str] | None, typer.Option(help="Two-letter code; may be given again.")]
Data = Annotated[
    list[str] | None, typer.Option(help="What it was trained on: a data set of the hub, or words; may be given again.")
]
Evaluations = Annotated[
    list[Path] | None, typer.Option("--evaluation", help="What evaluate --json printed; may be given again.")
]


def card(
    file: PrefixFile,
    out_file: Annotated[Path | None, t.to_write("--out", help="By default README.md beside the prefix.")] = None,
    name: Annotated[str | None, typer.Option(help="What it is called; by default as the file.")] = None,
    licence: Licence = None,
    language: Language = None,
    data: Data = None,
    evaluation: Evaluations = None,
    overwrite: t.Overwrite = False,
) -> None:
    """Write a model card for a prefix: README.md as the Hugging Face hub has it."""
    from foreword.prefix import Prefix

    prefix = Prefix.load(file)
    out_file = out_file or file.with_name("README.md")
    check_apart(out_file, file, *(evaluation or ()))
    check_new(out_file, overwrite=overwrite)
    text = _card(prefix, name or file.stem, licence, language, data, evaluation)
    with write_atomically(out_file) as aside:
        aside.write_text(text, encoding="utf-8")
    out.print(shown(str(out_file)))


def push(
    file: PrefixFile,
    repository: Repository,
    card_file: Annotated[Path | None, typer.Option("--card", help="A README.md; by default, one is written.")] = None,
    licence: Licence = None,
    language: Language = None,
    data: Data = None,
    evaluation: Evaluations = None,
    private: Annotated[bool, typer.Option("--private", help="For a repository that is made.")] = False,
) -> None:
    """Put a prefix and its model card on the Hugging Face hub.

    HF_TOKEN or `hf auth login` says who you are, HF_ENDPOINT which hub. A README.md that is there stays, unless --card or
    what a card is made of is given.
    """
    from foreword import hub
    from foreword.prefix import Prefix

    told = licence or language or data or evaluation
    if card_file is not None and told:
        raise SettingsError("--card is a whole README.md: give it, or what a card is made of, not both")
    text = None if card_file is None else text_of(card_file.read_bytes(), card_file)
    if told:
        text = _card(Prefix.load(file), repository.rpartition("/")[2], licence, language, data, evaluation)
    _quiet()
    out.print(shown(hub.push(file, repository, card=text, private=private)))


def pull(
    repository: Repository,
    out_file: t.OutFile,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; by default main.")] = None,
    file: Annotated[str, typer.Option(help="The file in the repository.")] = "prefix.safetensors",
    overwrite: t.Overwrite = False,
) -> None:
    """Get a prefix from the Hugging Face hub."""
    from foreword import hub

    _quiet()
    prefix = hub.pull(repository, out_file, revision=revision, file=file, overwrite=overwrite)
    out.print(shown(f"{out_file}: {prefix.length} virtual tokens for {prefix.card.base}"))


def _card(
    prefix: Prefix,
    name: str,
    licence: str | None,
    languages: list[str] | None,
    data: list[str] | None,
    evaluations: list[Path] | None,
) -> str:
    from foreword.hub import model_card

    return model_card(
        prefix,
        name=name,
        licence=licence,
        languages=languages or (),
        data=data or (),
        evaluations=[_evaluation(path) for path in evaluations or ()],
    )


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected what evaluate --json prints ({error})") from None
    if not isinstance(facts, dict):
        raise DataError(f"{path}: expected what evaluate --json prints; got {type(facts).__name__}")
    return facts


def _quiet() -> None:
    """The hub's progress bars are for a terminal, and what goes wrong is said once, by us."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not err.is_terminal:
        disable_progress_bars()
