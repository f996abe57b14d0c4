"""A byte-level transformer: small enough to read, real enough that compression errors show in its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from ._sizes import ModelSize

VOCABULARY = 256


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> (batch, time, width)."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden: Tensor = self.contract(functional.gelu(self.expand(self.mlp_norm(x)), approximate="tanh"))
        return x + hidden


class Transformer(nn.Module):
    """A causal language model over bytes."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.width)
        self.position = nn.Parameter(torch.empty(size.context, size.width))
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        self.apply(_initialise)
        # Large enough that the first layer norm does not blow gradients up: with 0.02 the gradient's norm
        # jumped to 69 in one of the first steps, and the loss with it; so it stays below 2.
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.position, std=0.1)
        for block in self.blocks:
            # GPT-2's rule: what is added to the residual stream shrinks with the number of additions.
            for name in ("project", "contract"):
                nn.init.normal_(getattr(block, name).weight, std=0.02 / (2 * size.layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Byte values, int64 (batch, time) with time <= context -> logits (batch, time, 256)."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy (nats per byte) of predicting each byte of ``windows`` from those before it."""
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
