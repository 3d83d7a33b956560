from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

# tiny models: more threads would only wait for each other, and the tests run in several processes
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, or a skip that names it."""
    folder = Path(os.environ.get("FOREWORD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no data folder at {folder}: set FOREWORD_DATA")
    return folder


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state for the process, and refuses another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
