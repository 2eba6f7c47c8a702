"""``python -m convert``: the ``weighbridge`` command."""

from .cli import main

main()
