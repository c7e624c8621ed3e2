"""The map of a serial bottleneck adapter (Houlsby et al. 2019, arXiv:1902.00751, section 2.1)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear, relu


def bottleneck(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """x + W_up relu(W_down x + b_down) + b_up, given back in the dtype of `x`.

    Shapes: x [..., d], down [m, d], down_bias [m], up [d, m], up_bias [d].
    """
    return x + linear(relu(linear(x.to(down.dtype), down, down_bias)), up, up_bias).to(x.dtype)


def parameters_per_site(width: int, inner: int) -> int:
    """2dm + d + m weights of one adapter: d = `width` of the stream, m = `inner`."""
    return 2 * width * inner + width + inner
