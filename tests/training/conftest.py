"""The folder in which the tests of this directory train tiny models."""

from tests.support.tiny_training import workspace

__all__ = ["workspace"]
