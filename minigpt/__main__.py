"""python -m minigpt."""

from minigpt.commands import main

if __name__ == "__main__":
    main()
