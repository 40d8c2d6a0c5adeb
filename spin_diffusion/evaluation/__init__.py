"""Measuring what was gained: scorers, statistics, the table of rounds, the gallery."""
