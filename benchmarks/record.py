"""What a benchmark leaves behind: JSON, and the machine its figures are of."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import foreword
from foreword.writing import write_atomically


def machine(device: str | torch.device | None = None) -> dict[str, Any]:
    """The machine, and what ran on it.

    Args:
        device: the base's. Default: the one torch would take.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "foreword": foreword.__version__,
    }


def _processor() -> str:
    # Linux: platform.processor() is empty there
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, value: Any) -> None:
    """Write the file aside and rename it; folders are made."""
    with write_atomically(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
