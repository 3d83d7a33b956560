"""What the package promises of itself: its names, its version, its extras, its help."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pickle
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import foreword
from foreword.cli import TRACKERS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "foreword").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MODULES = [
    module.name for module in pkgutil.walk_packages(foreword.__path__, "foreword.") if "__main__" not in module.name
]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def test_exports_equal_all() -> None:
    assert foreword.__all__ == sorted(foreword.__all__)
    told = [
        node for node in ast.walk(tree(ROOT / "src" / "foreword" / "__init__.py")) if isinstance(node, ast.ImportFrom)
    ]
    typed = {
        alias.name: node.module for node in told for alias in node.names if (node.module or "").startswith("foreword.")
    }
    assert sorted(typed) == foreword.__all__, "what type checkers see is not what is exported"
    for name, home in typed.items():
        module = importlib.import_module(str(home))
        assert getattr(foreword, name) is getattr(module, name)
        assert name in getattr(module, "__all__", [name])
    assert {*foreword.__all__, "__doc__"} <= {*dir(foreword)}
    with pytest.raises(AttributeError, match="module 'foreword' has no attribute 'adapter'"):
        foreword.adapter  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_what_it_exports(name: str) -> None:
    if name == "foreword.serve.connector":
        pytest.importorskip("vllm", reason="vLLM's own side, which its environment tests: make test-vllm")
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert [word for word in exported if not hasattr(module, word)] == []
    assert len(set(exported)) == len(exported)
    assert module.__doc__ or name == "foreword.version"


def test_every_error_is_exported() -> None:
    from foreword import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ValueError)}
    assert kinds == set(errors.__all__) == {name for name in foreword.__all__ if name.endswith("Error")}
    missing = pickle.loads(pickle.dumps(errors.MissingExtraError("eval", "sacrebleu")))
    assert str(missing).endswith("pip install 'foreword[eval]'")
    assert all(f"{name} " in (errors.__doc__ or "") for name in kinds), "the tree in the docstring lacks one"


@pytest.mark.parametrize(
    "code",
    [
        "import foreword, foreword.errors, foreword.cli",
        "import sys; sys.argv = ['foreword', '--help']; from foreword.cli import main; main()",
        "import sys; sys.argv = ['foreword', 'train', '--help']; from foreword.cli import main; main()",
    ],
)
def test_help_imports_neither_torch_nor_transformers(code: str) -> None:
    heavy = "{'torch', 'transformers', 'accelerate', 'safetensors', 'numpy'}"
    end = f"import atexit, sys; atexit.register(lambda: print(*sorted({heavy} & set(sys.modules)), file=sys.stderr)); "
    done = subprocess.run([sys.executable, "-c", end + code], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"


def test_version_is_one() -> None:
    assert "version" not in PROJECT["project"]
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "foreword.version.__version__"}
    assert importlib.metadata.version("foreword") == foreword.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", foreword.__version__)


def test_the_command_is_the_projects() -> None:
    (script,) = importlib.metadata.distribution("foreword").entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("foreword", PROJECT["project"]["scripts"]["foreword"])
    assert callable(script.load())


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def packages(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def test_the_extras_that_errors_name_hold_the_packages_that_they_name() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    raised = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MissingExtraError":
                extra, package = node.args
                assert isinstance(extra, ast.Constant), f"{path.name}: the extra is not written out"
                raised.append(extra.value)
                assert extra.value in extras, f"{path.name}: no extra {extra.value!r}"
                if isinstance(package, ast.Constant):
                    assert normal(package.value) in packages(extras[extra.value]), f"{path.name}: {package.value!r}"
    assert {"gguf", "data", "eval", "trackers"} <= set(raised)
    assert set(TRACKERS) == packages(extras["trackers"])


def test_the_help_page_is_what_the_commands_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["help"])
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(ROOT / "scripts" / "help"))
    page = (ROOT / "docs" / "help.md").read_text("utf-8")
    assert capsys.readouterr().out == page, "run .venv/bin/python scripts/help > docs/help.md"
    assert page.count("Usage: foreword") == page.count("\n## ") >= 8
