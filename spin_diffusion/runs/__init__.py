"""What every kind of run does before, between and after its rounds.

run            a run from its settings to the upload of its model, and the plan of one
start          its folder, its processes, its manifest; plan: the arithmetic of time, memory and disk
evaluator      base, rounds and rivals by the same code; page: what the page shows beside their scores
publish        the model card and the upload
image_*, language_*, answer_evaluator   what only images, or only answers, do in their own way
evaluate_models   the evaluation outside of a run; sweep: of settings of the sampler; drawer: models opened to draw
"""
