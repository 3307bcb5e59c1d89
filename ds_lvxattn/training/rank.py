"""The life of one rank of a command: how it ends, and what its exit code says."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

import torch.distributed as dist

from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.errors import ConfigError, RunError
from ds_lvxattn.training.watchdog import Watchdog

INTERRUPTED = 128 + signal.SIGINT  # as a shell has it


def run_rank(command: str, body: Callable[[Watchdog], None]) -> int:
    """Run the body of a command on this rank.

    Returns:
        The exit code: 0; 2 for a mistake of the user's, told by one message that is the same on every rank; 1 for a
        run that cannot go on, told by one message. Anything else does not return: a fault leaves with a traceback and
        code 1 at once, since cleaning up could wait for ranks that are gone, and Ctrl-C with one line and 130.
    """
    # DeepSpeed calls collectives by names that torch has renamed since, and every rank would tell the user so.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    watchdog = Watchdog()
    try:
        body(watchdog)
        code = 0
    except (ConfigError, SampleError) as error:
        # The same on every rank, before any collective can wait for a rank that has left.
        print(f"{command}: {error}", file=sys.stderr, flush=True)
        watchdog.failed(error, 2)
        code = 2
    except RunError as error:
        print(f"{command}: {error}", file=sys.stderr, flush=True)
        watchdog.failed(error)
        _leave(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # a terminal interrupts all of them
            print(f"{command}: interrupted in the phase '{watchdog.phase}'", file=sys.stderr, flush=True)
        watchdog.failed(KeyboardInterrupt("interrupted"), INTERRUPTED)
        _leave(INTERRUPTED)
    except BaseException as error:
        if (ended := watchdog.end_of_others()) is not None:
            # The collective that another rank has left. What matters is why, which that rank has told.
            code, why = ended
            print(f"{command}: {why}; here: {_first_line(error)}", file=sys.stderr, flush=True)
            _leave(code)
        traceback.print_exc()
        watchdog.failed(error)
        _leave(1)
    watchdog.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
