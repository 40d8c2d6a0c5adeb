"""Which data set, columns and rows. The fields are command-line flags; the names are diffusers' where it has one."""

from dataclasses import dataclass

from spin_diffusion.input_error import InputError


@dataclass(frozen=True)
class DataSettings:
    """Where the examples come from. Exactly one of `dataset_name` and `train_data_dir` must be given."""

    dataset_name: str | None = None
    """Hub id, local folder, parquet file or glob, webdataset tar or glob; braces as in shards/{0000..0009}.tar work."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set; of a local folder, the subfolder of this name."""
    dataset_split: str = "train"
    """Split of a hub data set or a local folder; files named by path or glob are all read, whatever their split."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    train_data_dir: str | None = None
    """Folder of images with a metadata.jsonl, .csv or .parquet (file_name and caption), or with a .txt beside each."""
    image_column: str | None = None
    """Column of the image; default: Pick-a-Pic's winner, else the first of image, jpg, jpeg, png, webp that exists."""
    caption_column: str | None = None
    """Column of the caption; default: the first of text, caption, prompt, txt that exists. A list gives its first."""
    max_train_samples: int | None = None
    """Stop after this many usable examples, in the order of the data set; fewer are no error."""
    one_image_per_prompt: bool = False
    """Keep only the first usable image of each caption."""
    filter_column: str | None = None
    """Column of numbers, such as an NSFW score; a row outside the bounds, or without a number, is left out."""
    filter_max: float | None = None
    """Largest value of filter_column that is kept."""
    filter_min: float | None = None
    """Smallest value of filter_column that is kept."""
    streaming: bool = False
    """Read a hub data set as a stream, with nothing copied to the disk. Local files are always read so."""
    max_bad_share: float = 0.01
    """Share (0 to 1) of rows with a corrupt image, missing image or empty caption; more of them is an error."""
    cache_dir: str | None = None
    """Folder for what is downloaded from the hub; by default the datasets library's."""

    def __post_init__(self) -> None:
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise InputError(
                f"--dataset_name {self.dataset_name!r} and --train_data_dir {self.train_data_dir!r} are both given: "
                "give one of them"
            )
        for flag, value in (("dataset_name", self.dataset_name), ("train_data_dir", self.train_data_dir)):
            if value is not None and not value.strip():
                raise InputError(f"--{flag} is empty: give a data set, or leave the flag away")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise InputError(
                f"--max_train_samples is {self.max_train_samples}: give at least 1, or leave the flag away"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise InputError(f"--max_bad_share is {self.max_bad_share}: it is a share of the rows, from 0 to 1")
        has_bound = self.filter_min is not None or self.filter_max is not None
        if self.filter_column is None and has_bound:
            raise InputError(
                "--filter_min or --filter_max is given without --filter_column: name the column to compare"
            )
        if self.filter_column is not None and not has_bound:
            raise InputError(
                f"--filter_column {self.filter_column!r} is given without a bound: add --filter_min or --filter_max"
            )
        if self.filter_min is not None and self.filter_max is not None and self.filter_min > self.filter_max:
            raise InputError(
                f"--filter_min {self.filter_min} is above --filter_max {self.filter_max}: no row could be kept"
            )
