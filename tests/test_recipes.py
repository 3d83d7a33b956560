"""Recipes: they are settings that exist, the paper's are its table's, and what the user gives wins."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_cli import Run, base, data, folders, prefix, run  # noqa: F401
from typer.testing import CliRunner

import foreword.bases
import foreword.training
from foreword.cli import app
from foreword.errors import SettingsError
from foreword.generation import GenerateSettings
from foreword.recipes import RECIPES, recipe
from foreword.training import TrainSettings

PAPER = {
    # Li & Liang 2021, table 5: learning rate, epochs, batch size, prefix length
    "paper-e2e": (8e-5, 5, 10, 5),
    "paper-webnlg": (5e-5, 5, 5, 5),
    "paper-dart": (5e-5, 10, 5, 10),
    "paper-xsum": (5e-5, 30, 14, 100),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_settings_that_exist_with_a_source(name: str) -> None:
    one = recipe(name)
    options = {k: v for k, v in one.options.items() if k != "max_input_tokens"}
    settings = TrainSettings(**options)
    assert options.items() <= dataclasses.asdict(settings).items()
    GenerateSettings(**one.generation)
    assert one.source


def test_the_papers_recipes_are_its_table() -> None:
    told = {
        name: tuple(one.options[option] for option in ("lr", "epochs", "batch_size", "length"))
        for name, one in RECIPES.items()
        if name.startswith("paper-")
    }
    assert told == PAPER
    assert RECIPES["paper-xsum"].options["max_input_tokens"] == 512
    for name, one in RECIPES.items():
        if name.startswith("paper-"):
            # the paper's code: an MLP from a random start, transformers' schedule and clipping of 2020, beams
            others = {"reparametrization": "mlp", "init": "random", "warmup": 0.0, "clip": 1.0, "weight_decay": 0.0}
            assert {key: one.options[key] for key in others} == others
            assert one.options["hidden"] == (800 if name == "paper-xsum" else 512)
            assert one.generation["num_beams"] == (6 if name == "paper-xsum" else 5)


def test_the_recipe_for_e2e_is_the_defaults_that_were_measured() -> None:
    assert TrainSettings(**RECIPES["e2e"].options) == TrainSettings(lr=1e-3)
    assert RECIPES["e2e"].generation == {"num_beams": 5}


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(
        SettingsError, match="expected a recipe of e2e, e2e-few, webnlg, summarization, paper-e2e, .*; got 'e3e'"
    ):
        recipe("e3e")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `foreword.train` was called with, last."""
    seen: dict[str, Any] = {}

    def train(*arguments: Any, **options: Any) -> None:
        seen.update(options)
        raise SettingsError("enough")

    monkeypatch.setattr(foreword.training, "train", train)
    return seen


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ((), {}),
        (("--length", 10), {"length": 10}),  # the default's value, and yet given
        (("--lr", 0.5, "--epochs", 2), {"lr": 0.5, "epochs": 2}),
        (("--reparametrization", "direct"), {"reparametrization": "direct", "hidden": None, "lr": None}),
        (("--reparametrization", "direct", "--lr", 0.5), {"reparametrization": "direct", "hidden": None, "lr": 0.5}),
        (("--reparametrization", "mlp"), {}),
        (("--init-text", "Describe:"), {"init_text": "Describe:", "init": "activations"}),
    ],
)
def test_what_is_given_wins_over_the_recipe(
    run: Run,
    base: Path,
    data: Path,
    trained: dict[str, Any],
    flags: tuple[object, ...],
    changed: dict[str, Any],
) -> None:
    run("train", "--base", base, "--data", data, "--out", "P.safetensors", "--recipe", "paper-e2e", *flags)
    assert trained["settings"] == TrainSettings(**{**RECIPES["paper-e2e"].options, **changed})


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ((), {"init_text": "table-to-text: describe the restaurant", "init": "activations"}),
        (("--init", "random"), {"init_text": None, "init": "random"}),
        (("--init-text", "Words"), {"init_text": "Words", "init": "activations"}),
    ],
)
def test_another_start_wins_over_a_recipes_words(
    run: Run, base: Path, data: Path, trained: dict[str, Any], flags: tuple[str, ...], start: dict[str, Any]
) -> None:
    run("train", "--base", base, "--data", data, "--out", "P.safetensors", "--recipe", "e2e-few", *flags)
    assert trained["settings"] == TrainSettings(**{**RECIPES["e2e-few"].options, **start})


def test_a_prefix_to_go_on_from_wins_over_a_recipes_words(
    run: Run, base: Path, data: Path, prefix: Path, trained: dict[str, Any]
) -> None:
    arguments = ["train", "--base", base, "--data", data, "--out", "P.safetensors", "--recipe", "e2e-few"]
    run(*arguments, "--init-from", prefix)
    assert trained["settings"].init_text is None
    assert trained["init_from"].length == 5


def test_lengths_of_a_recipe_reach_the_framing(run: Run, base: Path, data: Path, trained: dict[str, Any]) -> None:
    run("train", "--base", base, "--data", data, "--out", "P.safetensors", "--recipe", "paper-xsum")
    assert trained["framing"].max_input_tokens == 512
    assert trained["settings"].max_output_tokens == 60


def test_without_a_recipe_nothing_changes(run: Run, base: Path, data: Path, trained: dict[str, Any]) -> None:
    run("train", "--base", base, "--data", data, "--out", "P.safetensors")
    assert trained["settings"] == TrainSettings()


def test_a_wrong_recipe_is_one_line(run: Run, base: Path, data: Path) -> None:
    ran = run("train", "--base", base, "--data", data, "--out", "P.safetensors", "--recipe", "none")
    assert ran.code == 2
    assert ran.err.startswith("error: expected a recipe of e2e, ")
    assert ran.err.count("\n") == 1


def test_recipes_are_listed_with_their_sources() -> None:
    shown = CliRunner().invoke(app, ["recipes"]).output
    for name, one in RECIPES.items():
        assert name in shown
        assert one.source in shown
    assert "--lr 8e-05" in shown
    assert "--init-text 'table-to-text: describe the restaurant' --lr" in shown
