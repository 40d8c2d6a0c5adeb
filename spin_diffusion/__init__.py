"""Self-play fine-tuning: a model improves by playing against its own earlier self.

The rooms, from the top floor to the ground. A room imports only rooms that stand below it:

    cli           commands: from what a user types to the calls of the other rooms
    comparing     methods against each other from one base, through the same calls as a run
    runs          what every kind of run does before, between and after its rounds; evaluation outside of runs
    diffusion     DiffusionGame: the opponent's images, latents, noising, denoising errors, scores
    llm           LanguageGame: the opponent's answers, their log-probabilities, scores
    evaluation    scorers and judges, intervals, alarms, the report page
    selfplay      what images and text share: objectives, the training loop, the rounds
    samples       the one road of samples: asked for, drawn, scored, read, paired
    data          rows of a data set -> Example, TextExample: a prompt and one good image or answer
    store         the ground floor: files, keys, folders, settings from flags and YAML, progress
"""

__version__ = "0.1.0"
