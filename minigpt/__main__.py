"""python -m minigpt, and the command that is installed."""

import os
import signal
from types import FrameType
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line; Ctrl-C ends it with one line, also while modules are imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)  # main replaces it while a command runs
    from minigpt.commands import main

    try:
        main()
    except SystemExit as ended:
        if "WORLD_SIZE" in os.environ and isinstance(ended.code, int):
            # Under torchrun. Everything is saved and flushed, and the threads of torch.distributed
            # may still hold tensors: one that is released while Python finalizes ends in SIGABRT.
            os._exit(ended.code)
        raise


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    run()
