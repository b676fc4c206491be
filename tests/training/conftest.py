from __future__ import annotations

import os

import pytest
import torch

SLOW = (
    "torch", "lightning", "timm", "torchvision", "torchmetrics", "transformers", "peft", "pandas", "scipy", "sklearn",
    "matplotlib", "wandb",
)  # fmt: skip
"""Their imports are what an answer would wait for."""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def at_once(tmp_path_factory) -> dict[str, str]:
    """The environment of a command that must answer without importing what takes seconds to import."""
    folder = tmp_path_factory.mktemp("slow_imports")
    for name in SLOW:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}
