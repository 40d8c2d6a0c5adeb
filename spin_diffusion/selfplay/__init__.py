"""What images and text share: the contract of a game, the objectives, one training loop, the rounds and their folder.

Nothing here knows which modality it serves. In the order of a round:

rounds          all rounds of a run, state by state, and what is committed of each; round_settings
one_round       what the states are given; record: what they leave in round.json
sampled         the states before training: the opponent, its samples, and their tensors and scores
opponents       which earlier selves draw, and anchor the scores
game            the contract: pairs -> four scores each, by the modality
objectives      four scores -> loss; objective_names: what is known of one without torch
trained         the states from training on: the player, how good it is, and whether it is promoted
train           the loop of a round; train_settings; tracking: what a step says; health: what must hold
trainee         the player in training, whole or updated in the backward pass, and its optimizer; sharded: in parts
checkpoints     what a killed round goes on from
gap             what was learnt that carries over to held-out samples
device          tensors on their way to it, its precision, memory and rate
"""
