"""Samples on the disk: asked for, drawn, scored, read, paired. Whatever is drawn or scored walks this road.

drawn           prompts -> what every model is asked for -> its pictures or answers; photometry: measures of pictures
sample          one stored sample, and a batch of pairs
real            the data's samples, prepared once
shards          a folder of samples in parts, drawn and encoded; candidates: which of several drawn ones are played with
scores          the opponent's scores of them
stored_pairs    shards -> tensors of both sides; pairs: the stream of pairs that training sees
"""
