"""`python -m haltwise` is the command `haltwise`."""

from haltwise.cli import main

main()
