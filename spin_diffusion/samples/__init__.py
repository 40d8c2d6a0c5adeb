"""Samples on the disk: asked for, drawn, scored, read, paired. Whatever is drawn or scored walks this road."""
