"""What ranks are forked with: imported, or computed once, by the process that they are forked from.

Each of them would need seconds for it, in every world size. Nothing here starts a thread that a fork would lose.
"""

import gc
import tempfile
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # compiles functions, which imports the compiler
import deepspeed.sequence.layer  # noqa: F401
import hypothesis  # noqa: F401
import peft  # noqa: F401
import requests  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import wandb  # noqa: F401
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

import tests.support.distributed
import tests.support.hf
import tests.support.parity
import tests.support.text_models
import tests.support.tiny_families
import tests.support.training  # noqa: F401
from tests.support.tiny_model import tiny_loaded

torch.set_num_threads(1)
Image.init()
logging.disable_progress_bar()  # it has a thread
with tempfile.TemporaryDirectory() as folder:
    # transformers makes the names of the weights of all its models, a thousand patterns, when the first one is read.
    loaded = tiny_loaded()
    loaded.save(Path(folder), loaded.model.state_dict())
    AutoModelForImageTextToText.from_pretrained(folder)
logging.enable_progress_bar()
del loaded
gc.collect()
gc.freeze()  # collections of the ranks need not look at all this, nor copy its memory
