"""Measuring what was gained, in pictures and in answers: scorers and judges, statistics, alarms, table, report page."""
