"""Layers without initial values: a decoder gets its values from files.

torch's own layers draw values even on the meta device, where this imports torch._dynamo and sympy: three seconds in which
every command that loads a model would wait.
"""

from torch import nn


class EmptyLinear(nn.Linear):
    """A linear whose weight and bias hold whatever was in memory."""

    def reset_parameters(self) -> None:
        """Nothing is drawn."""


class EmptyEmbedding(nn.Embedding):
    """An embedding whose table holds whatever was in memory."""

    def reset_parameters(self) -> None:
        """Nothing is drawn."""
