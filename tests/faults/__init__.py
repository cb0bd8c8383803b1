"""Faults on purpose: damaged files, broken disks, kills at any moment; what a run must survive, and scripts that try it
at length."""
