"""Where the results of a run go."""

from dataclasses import dataclass
from pathlib import Path

from spin_diffusion.selfplay.objective_names import OBJECTIVES
from spin_diffusion.store.folder import MARKER
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.names import file_name, folder_inside
from spin_diffusion.store.settings import Settings, setting

_TAKEN = ("data", "base", "encodings", "unet", "lora", "model")
"""Folders of a run."""


@dataclass(frozen=True)
class RunSettings(Settings):
    """Where results go."""

    output_dir: str = setting("runs/spin", harmless=True, first=True)
    """Everything is written here; the same command again resumes."""
    compare_with: list[str] | None = setting(None, choices=OBJECTIVES)
    """Objectives to train beside the run, from the same base with the same steps, for the table; sft, say."""
    logging_dir: str = setting("logs", harmless=True)
    """Folder below output_dir for tensorboard; wandb and trackio keep to their own (WANDB_DIR, TRACKIO_DIR)."""
    report_to: str = setting("tensorboard", harmless=True)
    """tensorboard, wandb, trackio, all (that are installed) or none. wandb and trackio need the extra of their name."""
    tracker_project_name: str = setting("spin-diffusion", harmless=True)
    """The trackers' project: a name, not a path."""
    matrix_flops_per_second: float | None = setting(None, above=0, harmless=True)
    """What one device can do in large matrix products, FLOP/s: the ledger says what share of it was reached. Default:
    measured at the start."""
    push_to_hub: bool = setting(False, harmless=True)
    """Upload the trained weights or adapter, the model card and the report at the end."""
    hub_model_id: str | None = setting(None, harmless=True)
    """Repository to upload to; default: the output folder's name."""
    hub_token: str | None = setting(None, harmless=True)
    """Token for the hub; default: the one that is logged in."""
    debug: bool = setting(False, harmless=True)
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        file_name(self.tracker_project_name, "--tracker_project_name")
        first = Path(folder_inside(self.logging_dir, "--logging_dir")).parts[:1]
        if first and (first[0] in _TAKEN or first[0].startswith(("round-", MARKER)) or Path(first[0]).suffix):
            raise InputError(f"--logging_dir {self.logging_dir} is where a run keeps other things: give another name")
