"""Benchmarks: every claim of speed is a ratio to a rival in the same run, repeatable with one printed command."""
