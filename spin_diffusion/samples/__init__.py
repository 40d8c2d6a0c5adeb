"""Samples on the disk: asked for, drawn, scored, read, paired. Whatever is drawn or scored walks this road.

drawn           prompts -> what every model is asked for -> its pictures or answers; photometry: measures of pictures
sample          one stored sample, and a batch of pairs; shards: a folder of samples in parts, drawn and encoded
real            the data's samples, prepared once
candidates      which of several drawn samples are played with
scores          the opponent's scores of them
pairs           shards -> tensors of both sides, as the stream of pairs that training sees
"""
