"""Methods against each other from one base: equal steps, equal compute, each at its own best learning rate.

    settings.py    what is compared: worlds, methods, rates, seeds
    plan.py        settings -> cells: one training run each, named by what it is trained with
    cells.py       what lies in a cell's folder
    making.py      train a cell, draw and score its pictures; in several processes
    contest.py     who takes part, what the cells have scored so far, and what is chosen by that
    analysis.py    scores -> comparison.json, cells.parquet: intervals over seeds and prompts
    results.py     what comparison.json holds
    report.py      comparison.md, comparison.html
    compare.py     all of it, phase by phase

A method is a name and training settings: to add one, write it into the YAML file.
"""
