"""The model sizes that ``--model`` knows. No torch: the command line checks the text against them."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class ModelSize:
    """The shape of one transformer, and the learning rates that suit it.

    Attributes:
        width: the model dimension.
        context: the number of bytes in a training window.
        adamw, sgd: the highest learning rate under that optimizer.
    """

    width: int
    layers: int
    heads: int
    context: int
    adamw: float
    sgd: float = 0.1

    def learning_rate(self, optimizer: str) -> float:
        """The one for this of the ``OPTIMIZERS``."""
        return self.adamw if optimizer == "adamw" else self.sgd


OPTIMIZERS = ("adamw", "sgd")
"""Those that ``--optimizer`` knows: AdamW, and SGD with Nesterov's momentum."""

SIZES = {
    # Parameters: 0.8 M, 4.8 M, 19 M (of which each is used on few tokens: hard on a network), 25 M, 85 M.
    "tiny": ModelSize(width=128, layers=4, heads=4, context=128, adamw=2e-3),
    "small": ModelSize(width=256, layers=6, heads=8, context=256, adamw=1e-3),
    "wide": ModelSize(width=512, layers=6, heads=8, context=64, adamw=6e-4),
    "medium": ModelSize(width=512, layers=8, heads=8, context=256, adamw=6e-4),
    "large": ModelSize(width=768, layers=12, heads=12, context=512, adamw=4e-4),
}
