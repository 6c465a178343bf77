"""Run minigpt from the project's folder: python cli.py train ..."""

from minigpt.__main__ import run

if __name__ == "__main__":
    run()
