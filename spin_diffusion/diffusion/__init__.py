"""DiffusionGame: text-to-image models as players. One module per arrow of the method:

families   prompt -> the denoiser's inputs (the only place where SD and SDXL differ)
sampling   prompt -> the opponent's image
images     image -> what is stored -> latents
noising    latents -> noised at level t, and what the denoiser should say
errors     prediction -> denoising error -> score
game       all of it behind the contract that the rounds know
"""
