"""Settings of all tests."""

import gc
import os
import tempfile

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which any test module may do

# A machine that does other work too may stop a test for any time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Indices of films are kept there, and not in the home of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ds_lvxattn-cache-")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collections during the tests need not look at all that was imported."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # modules that count what is left at the end would complain
