"""A character GPT in plain torch: what demo_train.py trains. Knows nothing of checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class GPT(nn.Module):
    """Characters (batch, length) to logits (batch, length, vocabulary); about 12 * depth * width**2 parameters.

    max_length: the longest sequence it can read. The output layer is tied to the embedding.
    """

    def __init__(
        self, *, vocabulary: int, max_length: int, width: int, depth: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_initialise)
        self.head.weight = self.characters.weight

    def forward(self, characters: Tensor) -> Tensor:
        places = torch.arange(characters.shape[1], device=characters.device)
        x = self.dropout(self.characters(characters) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, characters: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of the next character, in nats."""
        return functional.cross_entropy(self(characters).flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Attention to what came before, then a perceptron; both added to their input."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.dropout(self._attend(self.attention_norm(x)), self.dropout, self.training)
        return x + functional.dropout(self.mlp(x), self.dropout, self.training)

    def _attend(self, x: Tensor) -> Tensor:
        heads = self.queries_keys_values(x).unflatten(2, (3, self.num_heads, -1))  # batch, length, 3, head, features
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        mixed: Tensor = self.attention_out(attended.transpose(1, 2).flatten(2))
        return mixed


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
