"""The trials behind the promises: each module holds one, as a function of its counts.

Tests run them small, `python -m benchmarks.reliability` runs them whole.
"""
