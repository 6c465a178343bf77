"""Put the model that ships into the wheel; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MODEL = Path("checkpoints/storyteller")


class BuildWithModel(build_py):
    """Copy the model folder into the package, where minigpt.checkpoint.resolve looks for it."""

    def run(self) -> None:
        super().run()
        if MODEL.is_dir() and not self.editable_mode:
            shutil.copytree(MODEL, Path(self.build_lib, "minigpt", MODEL.name), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithModel})
