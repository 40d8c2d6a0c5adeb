"""Methods against each other from one base: equal steps, equal compute, each at its own best learning rate.

    settings.py    what is compared: worlds, methods, rates, seeds
    plan.py        settings -> cells: one training run each, named by what it is trained with
    cells.py       one cell: train it, draw and score its pictures; resumable
    workers.py     cells in several processes
    choosing.py    which rate, guidance and round, by validation prompts
    intervals.py   intervals over prompts and seeds
    contest.py     who takes part, what the cells have scored so far, what they took
    phases.py      the phases of a comparison
    analysis.py    scores -> comparison.json, cells.parquet
    report/        comparison.md, comparison.html
    compare.py     all of it

A method is a name and training settings: to add one, write it into the YAML file.
"""
