"""Measuring what was gained, in pictures and in answers. In the order in which it is done:

prompt_sets     the prompts, each set with its hash and licence
protocols       what must be equal for two evaluations to be comparable
scorers         pictures -> scores; judges: answers -> scores; embeddings: pictures -> features; specs: what they say of
                themselves; scoring: runs them
evaluated       the samples of a model, read back with their scores
distribution    features of pictures -> distances to real ones, how much of them is covered
statistics      scores -> intervals and tests; comparison: models side by side
alarms          signs that scores were won without better samples
verdicts        what is concluded of a model, of several, and of a round's player
features        embeddings of pictures, kept; how far they are from real ones
results         all of it -> results.json; records: its parts as types, and its reader
tables          results in the terminal and in Markdown
report          results.json -> the page; gallery: a contact sheet
settings        what a run measures
"""
