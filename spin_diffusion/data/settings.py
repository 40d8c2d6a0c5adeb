"""Which data set, columns and rows. The fields are command-line flags; the names are diffusers' where it has one."""

from dataclasses import dataclass
from typing import Literal

from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.settings import Settings, setting


@dataclass(frozen=True)
class SourceSettings(Settings):
    """What data sets of images and of text have in common."""

    dataset_name: str | None = None
    """Hub id, local folder, file or glob."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set; of a local folder, the subfolder of this name."""
    dataset_split: str = "train"
    """Split of a hub data set or a local folder; files named by path or glob are all read, whatever their split."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    max_train_samples: int | None = setting(None, minimum=1)
    """Stop after this many usable examples, in the order of the data set; fewer are no error."""
    streaming: bool = False
    """Read a hub data set as a stream, with nothing copied to the disk. Local files are always read so."""
    num_held_out: int = setting(0, minimum=0)
    """Real samples that are never trained on, nor any other sample of their prompts. The opponent draws for them too,
    and every round is asked how well its player tells the two apart: the held-out gap."""
    max_bad_share: float = setting(0.1, minimum=0, maximum=1)
    """Share (0 to 1) of rows that are damaged, or have no image, no prompt or no answer. Fewer are named and left out,
    more of them is an error."""

    @property
    def holds_out(self) -> bool:
        """Whether any samples are held out."""
        return self.num_held_out > 0


@dataclass(frozen=True)
class FilterSettings:
    """Which rows are left out by a column of numbers: those outside the bounds, and those without a number."""

    column: str | None = None
    max: float | None = None
    """Largest value that is kept."""
    min: float | None = None
    """Smallest value that is kept."""

    def __post_init__(self) -> None:
        has_bound = self.min is not None or self.max is not None
        if self.column is None and has_bound:
            raise InputError("--filter min or max is given without a column: name the column to compare")
        if self.column is not None and not has_bound:
            raise InputError(f"--filter column {self.column!r} is given without a bound: add min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise InputError(f"--filter min {self.min} is above its max {self.max}: no row could be kept")


@dataclass(frozen=True)
class CurationSettings:
    """Which real images are played with, by a scorer: of those with at least the threshold the top. The scorer is
    in-domain for the evaluation afterwards."""

    scorer: str | None = None
    """NAME[=PATH] of the scorer that chooses, or a .py file with a `load(device)`."""
    top: int | None = setting(None, minimum=1)
    """Keep this many images, those with the highest scores."""
    threshold: float | None = None
    """Keep the images with at least this score, on the scorer's own scale."""

    def __post_init__(self) -> None:
        if self.scorer is None and self.rules:
            needs = "needs" if len(self.rules) == 1 else "need"
            raise InputError(
                f"--curation {' and '.join(self.rules)} {needs} a scorer, NAME[=PATH] such as pickscore, or a .py file"
            )

    @property
    def rules(self) -> list[str]:
        """Those that are given."""
        return [name for name in ("top", "threshold") if getattr(self, name) is not None]


@dataclass(frozen=True)
class DataSettings(SourceSettings):
    """Where the images come from. Exactly one of `dataset_name` and `train_data_dir` must be given."""

    dataset_name: str | None = setting(None, first=True, instead_of="train_data_dir")
    """Hub id, local folder, parquet file or glob, webdataset tar or glob; braces as in shards/{0000..0009}.tar work."""
    train_data_dir: str | None = setting(None, first=True, instead_of="dataset_name")
    """Folder of images with a metadata.jsonl, .csv or .parquet (file_name and caption), or with a .txt beside each.
    On the command line it stands for the --dataset_name of a file, and the reverse."""
    image_column: str | None = None
    """Column of the image; default: Pick-a-Pic's winner, else the first of image, jpg, png, ... that exists."""
    caption_column: str | None = None
    """Column of the caption; default: the first of text, caption, prompt, txt that exists. A list gives its first."""
    one_image_per_prompt: bool = False
    """Keep only the first usable image of each caption; with --curation the one with the highest score."""
    filter: FilterSettings = FilterSettings()
    """Leave out rows by a column of numbers, such as an NSFW score: "{column: nsfw, max: 0.5}"; or min."""
    curation: CurationSettings = CurationSettings()
    """Play with the real images that a scorer likes best: "{scorer: pickscore, threshold: 0.21, top: 500}"."""

    def __post_init__(self) -> None:
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise InputError(
                f"--dataset_name {self.dataset_name!r} and --train_data_dir {self.train_data_dir!r} are both given: "
                "give one of them"
            )
        super().__post_init__()
        if self.curation.scorer is not None and not (self.curation.rules or self.one_image_per_prompt):
            raise InputError(
                f"--curation scorer {self.curation.scorer} has no rule to choose by: give top, threshold or "
                "--one_image_per_prompt"
            )


@dataclass(frozen=True)
class TextDataSettings(SourceSettings):
    """Where prompts and real answers come from, and which of them are held out."""

    dataset_name: str | None = setting(None, first=True)
    """Hub id, local folder, .jsonl, .json or parquet file, or a glob of one kind; braces as in {0000..0009} work."""
    prompt_column: str | None = None
    """Column of the prompt, plain text or messages; default: prompt, where the answer's column does not hold it."""
    completion_column: str | None = None
    """Column of the real answer, plain text or messages, or of whole conversations; default: the first of real, chosen,
    messages, conversations, completion that exists."""
    rejected_column: str | None = None
    """Column of the worse answer, read for --objective dpo only; default: generated beside real, else rejected."""
    first_turn_only: bool = False
    """Use the first question of a conversation and its answer; default: the last answer, after everything before."""
    system_prompt: str | None = None
    """System turn that is put in front of conversations that have none."""
    keep_repeated: bool = False
    """Use equal rows as often as they occur, which is right for draws from a distribution; default: once."""
    held_out_dataset_name: str | None = None
    """Where held-out answers come from, named as --dataset_name is; default: --dataset_name."""
    held_out_split: str | None = None
    """Split that held-out answers come from, of a hub data set or a local folder; default: --dataset_split."""
    num_held_out: int = setting(0, minimum=0)
    """Held-out answers, which are never trained on; 0 = all of the held-out data set or split, none without one."""
    held_out_by: Literal["prompt", "row"] = "prompt"
    """prompt: no prompt of a held-out answer is trained on; row: both sides may share prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named: dict[str, str] = {}
        for flag in ("prompt_column", "completion_column", "rejected_column"):
            column = getattr(self, flag)
            if column is not None and named.setdefault(column, flag) != flag:
                raise InputError(f"--{named[column]} and --{flag} are both {column!r}: name two columns")
        is_same = self.dataset_name == (self.held_out_dataset_name or self.dataset_name)
        if self.has_held_out_source and is_same and self.held_out_split in (None, self.dataset_split):
            raise InputError(
                f"the held-out data are the training data (--dataset_name {self.dataset_name}, split "
                f"{self.dataset_split!r}): give another --held_out_split or --held_out_dataset_name, or "
                "--num_held_out alone to set some aside"
            )

    @property
    def has_held_out_source(self) -> bool:
        """Whether held-out answers come from another data set or split than the training data."""
        return self.held_out_dataset_name is not None or self.held_out_split is not None

    @property
    def holds_out(self) -> bool:
        """Whether any answers are held out."""
        return self.has_held_out_source or self.num_held_out > 0
