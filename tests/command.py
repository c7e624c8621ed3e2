"""`retain` as a script, for `warm.command`."""

from retain.cli import main

main()
