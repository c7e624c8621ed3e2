"""What a monitor adds to a training at its usual cadence."""

from __future__ import annotations

import statistics

from side_by_side import DEVICE, WARM_UP, Line, Settings, now, steps_in_turn
from training_steps import trainer

from retain.training.looks import Looker, undisturbed
from retain.training.monitor import ForgettingMonitor


def monitor(settings: Settings) -> list[Line]:
    """Looks against the steps between them: anchors at every look, the probes at those whose turn it is.

    A look takes as long whenever it comes, so it is timed by itself, after the steps.
    """
    import torch

    made = trainer(settings, [], settings.repeats + WARM_UP)
    step = statistics.median(steps_in_turn([made])[0])
    watch = ForgettingMonitor()
    c = watch.settings
    looker = Looker(watch.texts, watch.old, [], made.processing_class, c.anchor_tokens, c.confidence)
    with undisturbed(made.model, torch.device(DEVICE)):
        begin = now()
        base = looker.baseline(made.model, 0)
        once = now() - begin
        anchors, probes = [], []
        for i in range(settings.repeats):
            begin = now()
            looker.summary(looker.proxies(made.model, base), base)
            anchors.append(now() - begin)
            if i < 2:  # the longest part, and the steadiest
                begin = now()
                looker.answers(made.model, base)
                probes.append(now() - begin)
    short, long = statistics.median(anchors), statistics.median(probes)
    shares = [1 + (a + long / c.probes_every) / (c.every * step) for a in anchors]
    detail = (
        f"worked out from measured seconds and the usual cadence: a step {step:.2f} s, a look at {len(looker.rows)} "
        f"anchors {short:.2f} s, at {sum(len(p.items) for p in looker.probes)} items of {len(looker.probes)} probes "
        f"{long:.1f} s more, every {c.every} steps and at every {c.probes_every}th look. With the probes at every look "
        f"it would be {1 + (short + long) / (c.every * step):.3f}. Once, before training: {once:.1f} s."
    )
    work = "training with a monitor"
    found = statistics.median(shares)
    return [Line(work, "the same without", found, 1.05, min(shares), max(shares), detail=detail)]
