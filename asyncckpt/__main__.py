"""`python -m asyncckpt`: the command, also where its script is not on the PATH."""

from asyncckpt.cli import main

if __name__ == "__main__":
    main()
