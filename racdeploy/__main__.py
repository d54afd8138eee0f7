"""``python -m racdeploy``, as torchrun starts it."""

from racdeploy.cli.app import main

if __name__ == "__main__":
    main()
