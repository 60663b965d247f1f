"""What every test gets: one torch thread per process, and a reason where a CUDA device is missing."""

from __future__ import annotations

import pytest
import torch


def pytest_configure() -> None:
    # Tests run in as many processes as there are cores; tiny tensors gain nothing from more threads.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(
        reason="needs a CUDA device; torch sees none (`make gpu` runs these where it does)"
    )
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
