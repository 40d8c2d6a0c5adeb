"""DiffusionGame: text-to-image models as players. One module per arrow of the method:

curation     real images -> those that are played with, and the opponent's own: a scorer judges
families     prompt -> the denoiser's inputs (the only place where SD and SDXL differ); prompts keeps them
sampling     prompt -> the opponent's image
images       image -> what is stored -> latents, in sizes of buckets
noising      latents -> noised at level t, and what the denoiser should say
denoiser     the player and its frozen copy, the opponent; lora: two adapters on one UNet
questions    pairs -> what both models are asked about them
errors       prediction -> denoising error -> score, and how much each level counts
game         all of it behind the contract that the rounds know
shortcuts    are real and generated images told apart by traces of the decoder alone?
config       the settings of a run; cost: what its parts take in floating-point operations
original     the tensors of a pipeline under their original names; single_file: checkpoints in one file
base         what a run starts from, loaded whole; parts: its networks; model_sources: what is evaluated outside of runs
"""
