"""Settings of all tests."""

import gc
import os
import tempfile

import pytest
import torch
from hypothesis import settings

from tests.support.distributed import BACKEND, fork_the_server

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which any test module may do
if BACKEND != "nccl":  # the ranks compute on CPUs, on a machine with GPUs too
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported

# A machine that does other work too may stop a test for any time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Indices of films are kept there, and not in the home of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ds_lvxattn-cache-")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collections during the tests need not look at all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if session.testscollected and not session.config.option.collectonly:  # the process of xdist that runs none has none
        capture = session.config.pluginmanager.getplugin("capturemanager")
        capture.resume_global_capture()  # what ranks print is captured as well
        fork_the_server()
        capture.suspend_global_capture()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # modules that count what is left at the end would complain
