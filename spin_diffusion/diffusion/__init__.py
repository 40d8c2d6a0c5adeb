"""DiffusionGame: text-to-image models as players. One module per arrow of the method:

curation     real images -> those that are played with
families     prompt -> the denoiser's inputs (the only place where SD and SDXL differ); prompts keeps them
sampling     prompt -> the opponent's image
images       image -> what is stored -> latents, in sizes of buckets; latents shares them between runs
noising      latents -> noised at level t, and what the denoiser should say; trajectory: the sampler's own steps instead
denoiser     the player and its frozen copy, the opponent; lora: two adapters on one UNet
errors       prediction -> denoising error -> score; weighting: how much each level counts
batches      pairs -> passes through the denoiser -> the pairs' scores
game         all of it behind the contract that the rounds know
shortcuts    are real and generated images told apart by traces of the decoder alone?
candidates   a scorer as the judge of the opponent's own images
config       the settings of a run; cost: what its parts take in floating-point operations
base         which files the base is; parts: what of them is known; model_sources: what is evaluated outside of runs
"""
