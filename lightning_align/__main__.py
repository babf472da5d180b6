"""``python -m lightning_align`` is the ``lightning-align`` command."""

from lightning_align.cli import main

if __name__ == "__main__":
    main()
