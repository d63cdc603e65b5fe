"""What every test starts from: one thread, seed 0."""

import gc

import pytest
import torch

from support.roads import clipper_of as clipper_of

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: collections in tests need not walk through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
