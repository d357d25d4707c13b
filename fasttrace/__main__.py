"""``python -m fasttrace``: the same as the ``fasttrace`` command."""

from .cli import main

main()
