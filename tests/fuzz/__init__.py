"""Fuzzing, one target per parser. `make fuzz` runs them under atheris, tests/test_hostile.py over their seeds."""
