"""`python -m retain`: the command line, for `torchrun -m retain run …`."""

from retain.cli import main

main()
