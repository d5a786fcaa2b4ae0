"""A character transformer of about a million parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Block", "Transformer"]


class Block(nn.Module):
    """Attention over what came before, then a small feed-forward net; both with dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.before_feed = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, context, width) to the same."""
        batch, context, width = x.shape
        parts = self.attend(self.before_attention(x))
        shaped = parts.view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = shaped.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.mix(seen.transpose(1, 2).reshape(batch, context, width)))
        fed: Tensor = self.dropout(self.down(functional.gelu(self.up(self.before_feed(x)))))
        return x + fed


class Transformer(nn.Module):
    """Guesses the next character. Dropout is on, so the state of the generators matters."""

    def __init__(
        self, letters: int, context: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.letter = nn.Embedding(letters, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.last = nn.LayerNorm(width)
        self.guess = nn.Linear(width, letters)

    def forward(self, seen: Tensor, following: Tensor) -> Tensor:
        """The mean cross-entropy (0-d) of guessing what follows; both (batch, context)."""
        x = self.letter(seen) + self.place(torch.arange(seen.shape[1]))
        for block in self.blocks:
            x = block(x)
        guesses = self.guess(self.last(x))
        return functional.cross_entropy(guesses.flatten(0, 1), following.flatten())
