"""Rows of a data set -> Example. One file per layout; `read_examples` picks the layout by looking at the columns."""
