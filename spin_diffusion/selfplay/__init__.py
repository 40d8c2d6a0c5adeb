"""What images and text share: the contract of a game, the objectives, one training loop, the rounds and their folder.

Nothing here knows which modality it serves, and nothing here imports another room.
"""
