"""Faults on purpose: damaged files, broken disks, kills at any moment. Short tests, and scripts for long campaigns."""
