"""What images and text share: the contract of a game, the objectives, one training loop, the rounds and their folder.

Nothing here knows which modality it serves, and nothing here imports another room. In the order of a round:

rounds          all rounds of a run; round_settings; states: one function for each state of a round
one_round       what the states are given; journal, record: what they leave in round.json
opponents       which earlier self draws, and is the anchor of the scores
game            pairs -> four scores each, by the modality
objectives      four scores -> loss
train           the loop of a round; train_settings; step_metrics: what a step says; health: what must hold
trainee         the player in training, whole; sharded: in parts; fused: updated in the backward pass; optimizers
checkpoints     what a killed round goes on from
gap             what was learnt that carries over to held-out samples
run_dir         names, seeds, hashes, files that appear whole; ledger: what each phase took; progress; tracking
sending         tensors on their way to the device; precision: the dtype of autocast
"""
