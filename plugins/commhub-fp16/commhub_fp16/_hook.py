"""Averaging in float16."""

import torch

from commhub.toolkit import CastHook


class Fp16(CastHook):
    """Average gradients in float16: half the bytes of float32, 11 significant bits, at most 65504.

    The mean is taken before the cast, so that it overflows only where a rank's share of it does.

    Args:
        rules: by glob on parameter names, ``"dense"`` for what travels in the gradients' own dtype.
    """

    wire = torch.float16
