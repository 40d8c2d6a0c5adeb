"""Rows of a data set -> Example: a prompt and one good image; or TextExample: a prompt and one good answer.

A data set of images goes through two kinds of file, and neither is chosen by guessing from a path string:

    sources   what lies on the disk or the hub -> Rows   parquet_files, image_folder, webdataset, hub (by sources)
    layouts   what the columns mean -> Candidate         pickapic, table

To add a layout, put one file here that defines

    recognises(columns: Sequence[str]) -> bool
        Whether these columns are this layout's. At most one layout may say yes; when none does, `table` reads the rows.
    plan(source: Source, settings: DataSettings, with_losers: bool) -> Plan
        Which columns to read, and the function from a Row to a Candidate. The function raises `LeftOut` with one of
        report's reasons for a row that is not to be used; `plan` raises InputError for a column that does not exist
        (`rows.require_column` says it well).

Everything else is common and lives in `reading`: filter, caption, the check that the image decodes (`store.pictures`
is the one reader of pictures), repeats, counts.
To add a kind of file, put one file here that makes a `rows.TableFile` of a path (`rows.source_of_files` does the rest),
and name it where `sources` looks at what is there.

A data set of text comes from parquet_files, json_lines or hub; what its columns mean, and what is held out, is in
`text`. Its rows are counted by the same loop, `usable`.
"""
