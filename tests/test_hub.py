"""Model cards, and prefixes to and from a fake of the hub."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from fake_hub import TOKEN, FakeHub, serve
from huggingface_hub import ModelCard
from test_cli import Run, base, folders, prefix, run  # noqa: F401
from tiny import random_prefix, tiny_model

from foreword.errors import DataError, HubError, PrefixFileError, SettingsError
from foreword.hub import model_card, pull, push
from foreword.prefix import Card, Framing, Prefix

# huggingface_hub 2.4 hands its HTTP client bytes for Git LFS in a way that the client has given up
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def told(base: str = "org/tiny", **more: Any) -> Prefix:
    card = Card(
        base=base,
        fingerprint="ab" * 32,
        framing=Framing(template="Describe | {input}\n"),
        init="activations",
        training={"epochs": 7, "lr": 0.02, "rows": 11},
        metrics={"dev_loss": 1.25},
        **more,
    )
    return Prefix(random_prefix(tiny_model("gpt2"), 5).sections, card)


EVALUATION: dict[str, Any] = {
    "task": "e2e",
    "data": "some/where/devset.csv",
    "split": None,
    "prefix": "p.safetensors",
    "base": "org/tiny",
    "generation": {"num_beams": 5, "length_penalty": 1.0, "max_new_tokens": 100},
    "samples": 1000,
    "signatures": {"BLEU": "mteval-v13a|order:4", "ROUGE_L": "coco-rouge-l"},
    "missing": {"METEOR": "no java"},
    "scores": {
        "all": {
            "rows": 547,
            "figures": {"BLEU": 0.61234567, "ROUGE_L": 0.5},
            "intervals": {"BLEU": [0.6, 0.62], "ROUGE_L": [0.4, 0.6]},
        },
        "Food": {"rows": 3, "figures": {"BLEU": 0.25, "ROUGE_L": 0.125}, "intervals": {}},
    },
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The fake, with a cache and a token of our own; large files by Git LFS, since xet's server is no HTTP of the hub's."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve() as served:
        yield served


# the card


def test_an_encoder_decoders_card_and_a_summarys() -> None:
    prefix = told()
    both = Prefix(dict.fromkeys(("encoder", "decoder", "cross"), prefix.sections["decoder"]), prefix.card)
    card = ModelCard(model_card(both, name="voice", evaluations=[{**EVALUATION, "task": "summarization"}]))
    # the hub's widget would call it as a decoder
    assert card.data.pipeline_tag is None
    assert {result.task_type for result in card.data.eval_results} == {"summarization"}


def test_figures_of_a_part_of_the_data_say_so() -> None:
    text = model_card(told(), name="voice", evaluations=[{**EVALUATION, "limit": 10}])
    assert "On `devset.csv` (the first 10 inputs), num_beams 5" in text
    assert {one.dataset_name for one in ModelCard(text).data.eval_results} == {"devset.csv (the first 10 inputs)"}


def test_the_card_is_the_hubs_and_says_what_the_file_says() -> None:
    text = model_card(
        told(),
        name="voice",
        licence="cc-by-sa-4.0",
        languages=["en"],
        data=["tuetschek/e2e_nlg", "notes of our own"],
        evaluations=[EVALUATION],
    )
    card = ModelCard(text)
    data = card.data.to_dict()
    assert {key: value for key, value in data.items() if key != "model-index"} == {
        "base_model": "org/tiny",
        "datasets": ["tuetschek/e2e_nlg"],
        "language": ["en"],
        "library_name": "foreword",
        "license": "cc-by-sa-4.0",
        "metrics": ["bleu", "rouge"],
        "pipeline_tag": "text-generation",
        "tags": ["foreword", "prefix-tuning"],
    }
    assert card.data.model_name == "voice"
    results = card.data.eval_results
    assert [(r.metric_name, r.metric_type, r.metric_value, r.dataset_name, r.task_type) for r in results] == [
        ("BLEU", "bleu", 0.6123, "devset.csv", "text-generation"),
        ("ROUGE_L", "rouge", 0.5, "devset.csv", "text-generation"),
    ]
    assert results[0].metric_args == {"signature": "mteval-v13a|order:4"}
    for words in (
        "# voice",
        f"| the base's fingerprint | `{'ab' * 32}` |",
        "| virtual tokens | 5 |",
        "| parameters | 2,100 |",
        "| trained on | `tuetschek/e2e_nlg`, `notes of our own` |",
        "| licence | `cc-by-sa-4.0` |",
        "| epochs | `7` |",
        "| dev_loss | 1.25 |",
        r"`'Describe | {input}\n'`",
        "| all | 547 | 0.6123 [0.6000, 0.6200] | 0.5000 [0.4000, 0.6000] |",
        "| Food | 3 | 0.2500 | 0.1250 |",
        "$ foreword generate --base org/tiny --prefix prefix.safetensors",
    ):
        assert words in card.text, words


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("org/tiny", "org/tiny"),
        ("/srv/models/tiny", None),
        ("models/tiny.gguf/x", None),
    ],
)
def test_only_a_base_of_the_hub_is_in_the_metadata(base: str, named: str | None) -> None:
    card = ModelCard(model_card(told(base), name="voice"))
    assert card.data.base_model == named
    assert card.data.eval_results is None
    # where it lies on somebody's machine is not told
    shown = base if named else base.rpartition("/")[2]
    assert f"language model `{shown}`" in card.text
    assert f"| base | `{shown}` |" in card.text
    assert f"--base {shown} --prefix" in card.text
    assert named or base not in str(card)
    assert "not said; the base and the data have their own" in card.text


def test_a_folder_here_is_no_base_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelCard(model_card(told(), name="voice")).data.base_model is None


def scores(**figures: Any) -> dict[str, Any]:
    return {"all": {**EVALUATION["scores"]["all"], "figures": figures}}


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        *(
            ({k: v for k, v in EVALUATION.items() if k != lost}, f"it lacks '{lost}'")
            for lost in EVALUATION
            if lost not in ("prefix", "base", "missing")
        ),
        ({**EVALUATION, "scores": {"all": {"figures": {}}}}, "it lacks 'intervals'"),
        ({**EVALUATION, "scores": scores(BLEU=0.5)}, "it lacks 'ROUGE_L'"),
        ({**EVALUATION, "scores": scores(BLEU="high")}, "type str"),
        ({**EVALUATION, "generation": 5}, "'int' object has no attribute 'items'"),
    ],
)
def test_an_evaluation_that_is_something_else(evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"expected what `foreword evaluate --json` prints; .*{message}"):
        model_card(told(), name="voice", evaluations=[evaluation])


def test_an_evaluation_without_a_bootstrap() -> None:
    text = model_card(told(), name="voice", evaluations=[{**EVALUATION, "samples": 0}])
    assert "\nOn `devset.csv`, num_beams 5, length_penalty 1.0, max_new_tokens 100.\n" in text


# there and back


def test_push_and_pull(hub: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "voice.safetensors"
    told().save(path)
    url = push(path, "somebody/voice", endpoint=hub.url, token=TOKEN)
    ((commit, files),) = hub.repos["somebody/voice"]
    assert url == f"{hub.url}/somebody/voice/commit/{commit}"
    assert files.keys() == {"prefix.safetensors", "README.md"}
    assert files["prefix.safetensors"] == path.read_bytes()
    assert files["README.md"].decode() == model_card(Prefix.load(path), name="voice")
    assert not hub.private["somebody/voice"]
    assert list(hub.large.values()) == [path.read_bytes()]

    got = pull("somebody/voice", tmp_path / "got.safetensors", endpoint=hub.url)
    assert (tmp_path / "got.safetensors").read_bytes() == path.read_bytes()
    assert got.card == Prefix.load(path).card


def test_where_the_base_lies_is_not_published(hub: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "voice.safetensors"
    told(base="/home/alice/acme/llama").save(path)
    push(path, "voice", endpoint=hub.url, token=TOKEN)
    assert hub.messages == ["A prefix for llama"]
    assert "alice" not in hub.repos["somebody/voice"][-1][1]["README.md"].decode()


def test_a_second_push_is_a_second_version_and_keeps_the_card(hub: FakeHub, tmp_path: Path) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    told().save(old)
    told(base="org/other").save(new)
    push(old, "voice", card="# Mine\n", endpoint=hub.url, token=TOKEN)
    push(new, "voice", endpoint=hub.url, token=TOKEN)
    (first, _), (_, files) = hub.repos["somebody/voice"]
    assert files["README.md"] == b"# Mine\n"
    assert files["prefix.safetensors"] == new.read_bytes()
    out = tmp_path / "got.safetensors"
    assert pull("somebody/voice", out, endpoint=hub.url).card.base == "org/other"
    with pytest.raises(SettingsError, match="got.safetensors is there already"):
        pull("somebody/voice", out, endpoint=hub.url)
    assert pull("somebody/voice", out, revision=first, overwrite=True, endpoint=hub.url).card.base == "org/tiny"
    assert out.read_bytes() == old.read_bytes()
    push(new, "voice", card="# New\n", endpoint=hub.url, token=TOKEN)
    assert hub.repos["somebody/voice"][-1][1]["README.md"] == b"# New\n"


def test_a_private_repository(hub: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "voice.safetensors"
    told().save(path)
    push(path, "voice", private=True, endpoint=hub.url, token=TOKEN)
    assert hub.private["somebody/voice"]
    with pytest.raises(HubError, match=r"cannot pull prefix.safetensors from somebody/voice \(RepositoryNotFoundError"):
        pull("somebody/voice", tmp_path / "got.safetensors", endpoint=hub.url)
    pull("somebody/voice", tmp_path / "got.safetensors", endpoint=hub.url, token=TOKEN)
    commits = len(hub.repos["somebody/voice"])
    push(path, "voice", private=True, endpoint=hub.url, token=TOKEN)
    hub.private["somebody/voice"] = False
    with pytest.raises(SettingsError, match="somebody/voice is there already and public: make it private on the hub"):
        push(path, "voice", private=True, endpoint=hub.url, token=TOKEN)
    assert len(hub.repos["somebody/voice"]) == commits + 1
    push(path, "voice", endpoint=hub.url, token=TOKEN)


def test_a_card_of_a_prefix_that_does_not_say_how_it_started() -> None:
    prefix = told()
    bare = Prefix(prefix.sections, dataclasses.replace(prefix.card, init=""))
    assert "| started from | not said |" in model_card(bare, name="voice")


def test_what_is_no_prefix_is_not_written(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["somebody/voice"], hub.private["somebody/voice"] = [], False
    hub.commit("somebody/voice", {"prefix.safetensors": b"no prefix", "README.md": b"#"})
    out = tmp_path / "got.safetensors"
    with pytest.raises(PrefixFileError, match="expected a safetensors file"):
        pull("somebody/voice", out, endpoint=hub.url)
    with pytest.raises(PrefixFileError, match="expected a safetensors file"):
        pull("somebody/voice", out, file="README.md", endpoint=hub.url)
    assert not out.exists()
    (tmp_path / "no.safetensors").write_bytes(b"no prefix")
    calls = len(hub.calls)
    with pytest.raises(PrefixFileError, match="expected a safetensors file"):
        push(tmp_path / "no.safetensors", "voice", endpoint=hub.url, token=TOKEN)
    assert len(hub.calls) == calls


@pytest.mark.parametrize(
    ("repository", "file", "token", "message"),
    [
        ("somebody/none", "prefix.safetensors", TOKEN, r"cannot pull .* \(RepositoryNotFoundError"),
        ("somebody/voice", "other.safetensors", TOKEN, r"cannot pull other.safetensors .* \(RemoteEntryNotFoundError"),
    ],
)
def test_what_is_not_there(hub: FakeHub, tmp_path: Path, repository: str, file: str, token: str, message: str) -> None:
    hub.repos["somebody/voice"], hub.private["somebody/voice"] = [], False
    hub.commit("somebody/voice", {"README.md": b"#"})
    with pytest.raises(HubError, match=f"{message}.*: check the name, the network, and `hf auth login`"):
        pull(repository, tmp_path / "got.safetensors", file=file, endpoint=hub.url, token=token)
    assert not (tmp_path / "got.safetensors").exists()


def test_who_may_not_push(hub: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "voice.safetensors"
    told().save(path)
    with pytest.raises(HubError, match=r"cannot push to voice \(.*401"):
        push(path, "voice", endpoint=hub.url, token="hf_wrong")
    with pytest.raises(HubError, match=r"cannot push to else/voice \(.*403"):
        push(path, "else/voice", endpoint=hub.url, token=TOKEN)
    assert hub.repos == {}
    with pytest.raises(SettingsError, match="expected a repository such as OWNER/NAME"):
        pull("a/b/c", tmp_path / "got.safetensors", endpoint=hub.url)


# the commands


def test_the_card_command(run: Run, prefix: Path, tmp_path: Path) -> None:
    path = tmp_path / "voice.safetensors"
    path.write_bytes(prefix.read_bytes())
    evaluation = tmp_path / "e2e.json"
    evaluation.write_text(json.dumps(EVALUATION))
    flags = ("--license", "mit", "--language", "en", "--data", "notes", "--evaluation", evaluation)
    ran = run("card", path, *flags)
    assert (ran.code, ran.err, ran.out) == (0, "", f"{tmp_path / 'README.md'}\n")
    expected = model_card(
        Prefix.load(path), name="voice", licence="mit", languages=["en"], data=["notes"], evaluations=[EVALUATION]
    )
    assert (tmp_path / "README.md").read_text("utf-8") == expected
    again = run("card", path)
    assert again.code == 2
    assert again.err.startswith("error: ")
    assert "README.md is there already: choose another name, or give --overwrite" in again.err
    assert (tmp_path / "README.md").read_text("utf-8") == expected
    assert run("card", path, "--overwrite", "--name", "other").code == 0
    assert "# other" in (tmp_path / "README.md").read_text("utf-8")
    evaluation.write_text("[]")
    wrong = run("card", path, "--out", "card.md", "--evaluation", evaluation)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "expected what evaluate --json prints; got list" in wrong.err


def test_the_push_and_pull_commands(
    hub: FakeHub, run: Run, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pushed = run("push", prefix, "somebody/voice", "--license", "mit", "--private")
    assert (pushed.code, pushed.err) == (0, "")
    ((commit, files),) = hub.repos["somebody/voice"]
    assert pushed.out == f"{hub.url}/somebody/voice/commit/{commit}\n"
    assert b"license: mit" in files["README.md"]
    assert hub.private["somebody/voice"]
    (tmp_path / "card.md").write_text("# Mine\n")
    assert run("push", prefix, "somebody/voice", "--card", "card.md").code == 0
    assert hub.repos["somebody/voice"][-1][1]["README.md"] == b"# Mine\n"
    pulled = run("pull", "somebody/voice", "--out", "got.safetensors", "--revision", commit)
    assert (pulled.code, pulled.err) == (0, "")
    assert pulled.out.startswith("got.safetensors: 5 virtual tokens for ")
    assert (tmp_path / "got.safetensors").read_bytes() == prefix.read_bytes()
    wrong = run("pull", "somebody/none", "--out", "none.safetensors")
    assert wrong.code == 2
    assert wrong.err.startswith("error: cannot pull prefix.safetensors from somebody/none (")
    assert wrong.err.count("\n") == 1


def test_a_card_that_is_not_utf_8(run: Run, prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_bytes("# Café\n".encode("latin1"))
    ran = run("push", prefix, "somebody/voice", "--card", "card.md")
    assert (ran.code, ran.err) == (
        2,
        "error: card.md: expected UTF-8; byte 5 (0xe9) is not: save it as UTF-8, e.g. with iconv -t UTF-8\n",
    )


def test_a_whole_card_and_parts_of_one_exclude_each_other(run: Run, prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine\n")
    ran = run("push", prefix, "somebody/voice", "--card", "card.md", "--license", "mit")
    assert ran.code == 2
    assert ran.err == "error: --card is a whole README.md: give it, or what a card is made of, not both\n"
