"""Self-play fine-tuning: a model improves by playing against its own earlier self.

The rooms, in the order in which a round walks through them:

    data        rows of a data set -> Example (a prompt and one good image)
    diffusion   DiffusionGame: the opponent's images, latents, noising, denoising errors, scores
    selfplay    what images and text share: objectives, the training loop, the rounds, the run folder
    evaluation  scorers, intervals, the table of rounds
    config      settings from YAML and the command line
"""

__version__ = "0.1.0"
