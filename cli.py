"""Run minigpt from the project's folder: python cli.py train ..."""

from minigpt.commands import main

if __name__ == "__main__":
    main()
