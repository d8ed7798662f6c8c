"""One thread for all of them: nets this small gain nothing from a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread_for_fixtures() -> Iterator[None]:
    """Also while fixtures of a wider scope than a test's are set up."""
    yield from _one_thread()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from _one_thread()


def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
