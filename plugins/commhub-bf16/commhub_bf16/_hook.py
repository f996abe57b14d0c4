"""Averaging in bfloat16."""

import torch

from commhub.toolkit import CastHook


class Bf16(CastHook):
    """Average gradients in bfloat16: half the bytes of float32 and its range, 8 significant bits.

    Args:
        rules: by glob on parameter names, ``"dense"`` for what travels in the gradients' own dtype.
    """

    wire = torch.bfloat16
