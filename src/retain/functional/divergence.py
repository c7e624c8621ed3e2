"""Divergences between two next-token distributions from dense logits; small, exact and differentiable.

`p⁰` is the teacher (the starting model), `p` the student. All results are per position, in nats, and carry
the factor T² that keeps the size of the gradient when the temperature is raised (Hinton, Vinyals, Dean 2015,
arXiv:1503.02531, §2). For vocabularies of real models use `tiled_head`, which gives the same numbers without
holding the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retain.errors import ConfigError


def kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward divergence T² · KL(p⁰_T ‖ p_T): keeps everything that the teacher thought possible.

    Args:
        teacher_logits: [..., V]; −inf marks an impossible token.
        student_logits: [..., V].
        temperature: T > 0.

    Returns:
        [...], ≥ 0.

    Raises:
        ConfigError: temperature ≤ 0.
    """
    log_p0, log_p = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return temperature**2 * _relative(log_p0, log_p)


def reverse_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Reverse divergence T² · KL(p_T ‖ p⁰_T); mode-seeking. Shapes and errors as in `kl`."""
    return kl(student_logits, teacher_logits, temperature)


def jsd(teacher_logits: Tensor, student_logits: Tensor, weight: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence (Agarwal 2023, arXiv:2306.13649), times T².

    w KL(p⁰‖m) + (1 − w) KL(p‖m) with m = w p⁰ + (1 − w) p. Divided by w it tends to the forward divergence
    as w → 0; divided by 1 − w to the reverse one as w → 1.

    Args:
        teacher_logits: [..., V].
        student_logits: [..., V].
        weight: w in (0, 1), the share of the teacher in the mixture.
        temperature: T > 0.

    Returns:
        [...], between 0 and T² log 2.

    Raises:
        ConfigError: weight or temperature out of range.
    """
    if not 0 < weight < 1:
        raise ConfigError(
            f"jsd.weight: {weight} given; allowed: between 0 and 1. For the ends take 'kl' or 'reverse_kl'."
        )
    log_p0, log_p = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    # Impossible on both sides: logaddexp(−inf, −inf) has a NaN gradient, and the entry counts nothing anyway.
    dead = torch.isneginf(log_p0) & torch.isneginf(log_p)
    log_weight = log_p.new_tensor(weight).log()
    log_rest = torch.log1p(-log_p.new_tensor(weight))
    log_m = torch.logaddexp(log_p0.masked_fill(dead, 0) + log_weight, log_p.masked_fill(dead, 0) + log_rest)
    forward, reverse = _relative(log_p0, log_m), _relative(log_p, log_m)
    return temperature**2 * (weight * forward + (1 - weight) * reverse)


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of a teacher, to be stored: ids [..., k] and log-probabilities [..., k].

    The log-probabilities are those of the whole vocabulary at this temperature, not renormalised; a stored
    list cannot be brought to another temperature later because its tail is unknown.

    Raises:
        ConfigError: k is not between 1 and V, or temperature ≤ 0.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ConfigError(f"top_k.k: {k} given; allowed: 1 to {logits.shape[-1]}, the size of the vocabulary.")
    values, ids = _log_softmax(logits, temperature).topk(k, dim=-1)
    return ids, values


def top_k_kl(ids: Tensor, teacher_log_probs: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(p⁰‖p) over the k stored tokens and one bucket for all others.

    Never above `kl` and equal to it for k = V (data processing inequality). Without the bucket the student
    could move all remaining mass at no cost.

    Args:
        ids: [..., k] token ids of the teacher's list.
        teacher_log_probs: [..., k], taken at the same temperature.
        student_logits: [..., V].
        temperature: T > 0.

    Returns:
        [...].

    Raises:
        ConfigError: temperature ≤ 0.
    """
    student = _log_softmax(student_logits, temperature).gather(-1, ids)
    return temperature**2 * tail_kl(teacher_log_probs, student)


def tail_kl(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """KL over k outcomes and their tail, from log-probabilities [..., k] of both at the same ids → [...].

    The student's may come from `tiled_head.log_probs` with labels [N, k]. The caller multiplies by T².
    """
    return _relative(_with_tail(teacher_log_probs), _with_tail(student_log_probs))


def log_tail(log_probs: Tensor) -> Tensor:
    """log(1 − Σ exp(log_probs)) over the last axis, finite even where the sum is 1; [..., k] → [..., 1]."""
    whole = torch.logsumexp(log_probs, dim=-1, keepdim=True)
    limit = -torch.finfo(whole.dtype).eps
    return torch.log(-torch.expm1(whole.clamp(max=limit)))


def mask_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Take the label out of a distribution: its logit becomes −inf; [..., V] and [...] → [..., V].

    Done to both sides before a divergence it gives Mask-the-Target (arXiv:2605.29498): everything except the
    label must keep its relative probability, and the logit of the label gets no gradient.
    """
    return logits.scatter(-1, labels[..., None], -torch.inf)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ConfigError(f"temperature: {temperature} given; allowed: greater than 0.")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits.to(wide) / temperature, dim=-1)


def _with_tail(log_probs: Tensor) -> Tensor:
    return torch.cat([log_probs, log_tail(log_probs)], dim=-1)


def _relative(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b); an outcome with a = 0 counts nothing, in the value and in the gradient, whatever b is."""
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0)).sum(-1)
