"""``python -m fasttrace``: the same as the ``fasttrace`` command."""

from .cli.app import main

main()
