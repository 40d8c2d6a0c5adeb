"""What every kind of run does before, between and after its rounds.

`start` takes the run folder and plays the rounds; `plan` predicts time, memory and disk; `evaluator` evaluates base,
rounds and rivals; `publish` writes the model card and uploads. For images and for language: `image_run` and
`language_run`, with what only one of them needs beside them. `evaluate_models` is the evaluation outside of a run."""
