"""A prefix on the Hugging Face hub: its model card, and the file there and back.

A repository of a prefix holds `prefix.safetensors` and `README.md`, the model card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.builtin import BUILT_IN
from foreword.checkpoint import check_out
from foreword.errors import DataError, ForewordError, HubError, SettingsError, one_line
from foreword.prefix import Card, Prefix
from foreword.tasks.sources import HUB
from foreword.training import FILE_NAME
from foreword.writing import write_atomically

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["model_card", "pull", "push"]

README = "README.md"

_TASK_TYPES = {"summarization": "summarization"}
"""The hub's names of tasks, by ours; the others are text generation."""

_METRIC_TYPES = {
    **{"BLEU": "bleu", "NIST": "nist_mt", "METEOR": "meteor", "ROUGE_L": "rouge", "CIDEr": "cider", "TER": "ter"},
    **{"ROUGE-1": "rouge", "ROUGE-2": "rouge", "ROUGE-L": "rouge", "chrF": "chrf", "BERTScore": "bertscore"},
}


def model_card(
    prefix: Prefix,
    *,
    name: str,
    licence: str | None = None,
    languages: Sequence[str] = (),
    data: Sequence[str] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A README.md in the hub's model-card form: metadata in YAML, then text for people.

    Args:
        prefix: whose card says the base, the framing, the training and its figures.
        name: what the prefix is called.
        licence: an identifier of the hub's, such as `cc-by-sa-4.0`. The prefix's own: the base and the data have theirs.
        languages: two-letter codes.
        data: what it was trained on: ids of the hub's data sets, which the metadata names; else words, for people.
        evaluations: what `foreword evaluate --json` printed, each.

    Raises:
        DataError: an evaluation is something else.
    """
    from huggingface_hub import ModelCard, ModelCardData

    try:
        results = [result for one in evaluations for result in _results(one)]
        told = [part for one in evaluations for part in _evaluation(one)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"expected what `foreword evaluate --json` prints; {lacks}") from None
    ids = [one for one in data if re.fullmatch(r"[\w.-]+/[\w.-]+|[a-z0-9_-]+", one)]
    metadata = ModelCardData(
        base_model=_hub_id(prefix.card.base),
        datasets=ids or None,
        eval_results=results or None,
        language=list(languages) or None,
        library_name="foreword",
        license=licence,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,  # it has a place beside results alone
        pipeline_tag="text-generation" if set(prefix.sections) == {"decoder"} else None,
        tags=["foreword", "prefix-tuning"],
    )
    parts = [
        f"# {name}",
        "A prefix, trained with [prefix-tuning](https://arxiv.org/abs/2101.00190) (Li & Liang 2021): keys and values that "
        f"stand before the input of the frozen language model {_code(_base_name(prefix.card.base))}, in every attention layer. It is of "
        "no use without that model.",
        _table(("", ""), _facts(prefix, licence, data)),
        _use(prefix.card),
        "## Training",
        _table(("setting", "value"), [(key, _code(value)) for key, value in sorted(prefix.card.training.items())]),
    ]
    if prefix.card.metrics:
        figures = [(key, f"{value:.4g}") for key, value in sorted(prefix.card.metrics.items())]
        parts += ["Losses are means over the tokens of the outputs, in nats.", _table(("figure", "value"), figures)]
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join([*parts, *told]) + "\n"))


def _facts(prefix: Prefix, licence: str | None, data: Sequence[str]) -> list[tuple[str, str]]:
    card = prefix.card
    sections = ", ".join(f"{section}: {len(layers)} layers" for section, layers in prefix.sections.items())
    return [
        ("base", _code(_base_name(card.base))),
        ("the base's fingerprint", _code(card.fingerprint)),
        ("virtual tokens", str(prefix.length)),
        ("sections", sections),
        ("parameters", f"{prefix.num_parameters:,}"),
        ("started from", _code(card.init) if card.init else "not said"),
        ("trained on", ", ".join(map(_code, data)) or "not said"),
        ("licence", _code(licence) if licence else "not said; the base and the data have their own"),
        ("made", _code(card.created)),
    ]


def _use(card: Card) -> str:
    chat, template = card.framing.chat, card.framing.template
    framed = "by the base's chat template" if chat else f"by the template {_code(repr(template))}"
    return (
        "## Use\n\n```console\n"
        f"$ foreword pull REPOSITORY --out {FILE_NAME}\n"
        f'$ foreword generate --base {_base_name(card.base)} --prefix {FILE_NAME} "INPUT"\n'
        f"```\n\nInputs are framed {framed}, which the file says too."
    )


def _evaluation(facts: Mapping[str, Any]) -> list[str]:
    names = list(facts["signatures"])
    rows = []
    for group, one in facts["scores"].items():
        cells = []
        for name in names:
            low, high = one["intervals"].get(name, (None, None))
            cells.append(f"{one['figures'][name]:.4f}" + ("" if low is None else f" [{low:.4f}, {high:.4f}]"))
        rows.append((group, str(one["rows"]), *cells))
    how = ", ".join(f"{key} {value}" for key, value in facts["generation"].items())
    draws = facts["samples"]
    return [
        f"## Evaluation: {facts['task']}",
        f"On {_code(_data_name(facts))}{_part(facts)}, {how}"
        + (f"; 95% intervals of {draws} bootstrap samples." if draws else "."),
        _table(("", "inputs", *names), rows),
        "\n".join(f"- {name}: {_code(signature)}" for name, signature in facts["signatures"].items()),
    ]


def _data_name(facts: Mapping[str, Any]) -> str:
    """Where it lies here is nobody's business."""
    data = str(facts["data"])
    return data if data.startswith(HUB) else Path(data).name


def _part(facts: Mapping[str, Any]) -> str:
    return f" (the first {facts['limit']} inputs)" if facts.get("limit") else ""


def _results(facts: Mapping[str, Any]) -> list[Any]:
    """The figures of an evaluation as the hub's EvalResults; those of groups are in the text alone."""
    from huggingface_hub import EvalResult

    task, data = facts["task"], _data_name(facts)
    return [
        EvalResult(
            task_type=_TASK_TYPES.get(task, "text-generation"),
            task_name=task,
            dataset_type=task,
            dataset_name=data + _part(facts),
            dataset_split=facts["split"],
            metric_type=_METRIC_TYPES.get(name, name.lower()),
            metric_name=name,
            metric_value=round(value, 4),
            metric_args={"signature": facts["signatures"][name]},
        )
        for name, value in facts["scores"]["all"]["figures"].items()
    ]


def _hub_id(base: str) -> str | None:
    if base in BUILT_IN:
        return BUILT_IN[base].hub
    return base if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists() else None


def _base_name(base: str) -> str:
    """As of data, where a folder or a file lies here is left away."""
    return base if base in BUILT_IN or _hub_id(base) else Path(base).name


def _code(value: object) -> str:
    return "`" + str(value).replace("`", "'").replace("\n", r"\n") + "`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escape = r"\|"
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', escape) for cell in line)} |" for line in lines)


def push(
    path: str | os.PathLike[str],
    repository: str,
    *,
    card: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Put a prefix file, and its model card, into a repository of the hub, in one commit.

    Args:
        path: the prefix file; it is read and checked first.
        repository: `NAME` or `OWNER/NAME`; made where there is none.
        card: README.md's content. Default: one that says what the file says, where the repository has none yet.
        private: whether a repository that is made is seen by its owner alone; one that is there must be so already.
        endpoint: address of the hub. Default: huggingface_hub's own, or `HF_ENDPOINT`.
        token: Default: the one of `hf auth login`, or `HF_TOKEN`.

    Returns:
        The address of the commit.

    Raises:
        PrefixFileError: the file is no prefix. HubError: the hub cannot be reached or refuses.
        SettingsError: the repository's name cannot be one, or it is public and is to be private.
    """
    from huggingface_hub import CommitOperationAdd

    path = Path(path)
    prefix = Prefix.load(path)
    api = _api(endpoint, token)
    with _hub(f"push to {repository}"):
        repo = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo).private:
            raise SettingsError(f"{repo} is there already and public: make it private on the hub, or name another")
        if card is None and not api.file_exists(repo, README):
            card = model_card(prefix, name=repo.rpartition("/")[2])
        files = [CommitOperationAdd(FILE_NAME, str(path))]
        if card is not None:
            files.append(CommitOperationAdd(README, card.encode()))
        return str(
            api.create_commit(repo, files, commit_message=f"A prefix for {_base_name(prefix.card.base)}").commit_url
        )


def pull(
    repository: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    file: str = FILE_NAME,
    overwrite: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> Prefix:
    """Get a prefix file from a repository of the hub.

    Args:
        repository: `OWNER/NAME`.
        out: the file to write, once it is found to be a prefix.
        revision: branch, tag or commit. Default: main.
        file: the file's name in the repository.
        overwrite: replace what is at `out`.
        endpoint, token: as for `push`.

    Returns:
        The prefix.

    Raises:
        PrefixFileError: what is there is no prefix. HubError: the hub cannot be reached, or has no such thing.
        SettingsError: something is at `out` already. TrainingError: a run that did not end writes there.
    """
    check_out(out, resume=None, overwrite=overwrite)
    api = _api(endpoint, token)
    with _hub(f"pull {file} from {repository}"):
        data = Path(api.hf_hub_download(repository, file, revision=revision)).read_bytes()
    prefix = Prefix.from_bytes(data)
    with write_atomically(out) as aside:
        aside.write_bytes(data)
    return prefix


def _api(endpoint: str | None, token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    # huggingface_hub itself reads the variable when it is imported
    return HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"), token=token)


@contextmanager
def _hub(doing: str) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except ForewordError:
        raise
    except HFValidationError as error:
        raise SettingsError(f"expected a repository such as OWNER/NAME ({_short(error)})") from None
    except Exception as error:  # the hub's own, those of HTTP, of the disk and of xet
        raise HubError(
            f"cannot {doing} ({type(error).__name__}: {_short(error)}): check the name, the network, and `hf auth login`"
        ) from error


def _short(error: BaseException) -> str:
    """Its message, and that of what caused it, on one line."""
    text = one_line(error, 300)
    return text if error.__cause__ is None else f"{text} {_short(error.__cause__)}"
