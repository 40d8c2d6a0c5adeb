"""The states of a round, one function each: (the round, its record so far) -> what the state has done.

opponent    OPPONENT: which earlier selves play the opponent, with the hashes of their weights
generated   GENERATED: the opponent's samples, and which of several candidates make the pairs
cached      CACHED: samples as tensors, and the opponent's scores where they are kept
trained     TRAINED: the player; before it, what a probe says of the samples
decided     EVALUATED: how good the player is; PROMOTED or REJECTED

To add a state, write its function here and name it in `rounds.STEPS` and `record.State`.
"""
