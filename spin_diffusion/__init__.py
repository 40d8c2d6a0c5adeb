"""Self-play fine-tuning: a model improves by playing against its own earlier self.

The rooms, in the order in which a run walks through them:

    command, parsing, config   flags and YAML -> settings; what a user reads where they are wrong
    data                       rows of a data set -> Example, TextExample: a prompt and one good image or answer
    diffusion                  DiffusionGame: the opponent's images, latents, noising, denoising errors, scores
    llm                        LanguageGame: the opponent's answers, their log-probabilities, scores
    selfplay                   what images and text share: objectives, the training loop, the rounds, the run folder
    running, evaluating        what every kind of run does before, between and after its rounds
    evaluation                 scorers and judges, intervals, alarms, the report page
    comparing                  methods against each other from one base
"""

__version__ = "0.1.0"
