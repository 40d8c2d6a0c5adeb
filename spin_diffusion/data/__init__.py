"""Rows of a data set -> Example: a prompt and one good image; or TextExample: a prompt and one good answer.

sources        what lies on the disk or the hub -> Source of rows, by looking at what is there
files          parquet, JSON and tars; image_folder: pictures with captions beside them; hub: the datasets library's
reading        what the columns mean -> examples of images; text: the same of text, and what is held out
rows           what becomes of every row: an example, or left out for a counted reason

`store.pictures` is the one reader of pictures.
"""
