"""Tests: one test_<module>.py a module; oracles.py holds tiny checkpoints and reference models."""
