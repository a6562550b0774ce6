"""Settings for every test: offline, few threads, the same random numbers each time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(min(torch.get_num_threads(), 2))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process for all tests of a file, whose fixtures they share, and one for all of the demo."""
    for item in items:
        file = item.path.relative_to(item.config.rootpath)
        group = "demo" if file.parts[:2] == ("tests", "demo") else str(file)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
