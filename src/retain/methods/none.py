"""None — plain fine-tuning, the baseline that every method is compared with.

    L = L_new

Deviations from the paper: none.
Needs: nothing.
Cost: none.
Combine with: anything; it does nothing.   Conflicts: none.
Tune: nothing. Sweep the learning rate before saying that a method beats it.
"""

from __future__ import annotations

from retain.methods.base import Method, MethodConfig


class Plain(Method):
    """Plain fine-tuning."""

    family = "baseline"
    paper = "none"
    off = {}

    class Config(MethodConfig):
        pass

    @property
    def active(self) -> bool:
        return False
