"""`retain WORDS`, in a process of its own."""

from retain.cli import main

main()
