"""Measuring what was gained, in pictures and in answers. In the order in which it is done:

prompt_sets     the prompts, each set with its hash and licence
protocols       what must be equal for two evaluations to be comparable; modalities: how pictures and answers differ
scorers         pictures -> scores; judges: answers -> scores; specs: what both say of themselves; scoring: runs them
evaluated       the samples of a model, read back with their scores
statistics      scores -> intervals and tests; comparison: models side by side
alarms          signs that scores were won without better pictures; answer_alarms: without better answers
breakdowns      the difference within parts of the prompts
results         all of it -> results.json; closing: what is said of it
records         the parts of results.json as types; results_file: its reader
report          results.json -> the page; gallery: a contact sheet
in_rounds       all of it after every round of a run; settings
"""
