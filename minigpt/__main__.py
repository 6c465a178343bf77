"""Entry point of ``python -m minigpt`` and of the installed command."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line; Ctrl-C exits with one line, even while modules are being imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)  # main replaces it while a command runs
    try:
        from minigpt.commands import main
    except ModuleNotFoundError as error:
        remedy = "Activate minigpt's environment; python install.py creates one in .venv."
        sys.exit(f"error: {error.name} is not installed for {sys.executable}. {remedy}")
    try:
        main()
    except SystemExit as ended:
        if "WORLD_SIZE" in os.environ and isinstance(ended.code, int):
            # Under torchrun. Everything is saved and flushed, but torch.distributed's threads may
            # still hold tensors: releasing one while Python finalizes aborts the process.
            os._exit(ended.code)
        raise


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    run()
