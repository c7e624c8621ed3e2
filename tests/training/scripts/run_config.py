"""`retain run` as a script. Argument: a configuration file. Prints one line per event."""

import sys

import torch

from retain.config import read
from retain.errors import RetainError
from retain.pipeline import run

if __name__ == "__main__":
    try:
        run(read(sys.argv[1]), lambda line: print("SAID", line, flush=True))
    except RetainError as error:
        print("ERROR", type(error).__name__, error, flush=True)
        sys.exit(error.exit_code)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
