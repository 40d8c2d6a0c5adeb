"""Where the results of a run go."""

from dataclasses import dataclass

from spin_diffusion.selfplay.objective_names import OBJECTIVES
from spin_diffusion.store.input_error import file_name
from spin_diffusion.store.settings import Settings, setting


@dataclass(frozen=True)
class RunSettings(Settings):
    """Where results go."""

    output_dir: str = setting("runs/spin", harmless=True, first=True)
    """Everything is written here; the same command again resumes."""
    continue_from: str | None = None
    """Folder of another run, with the same base, whose last promoted player this one starts from, with settings of its
    own and in a folder of its own; the other run's evaluation of the base is taken over."""
    compare_with: list[str] | None = setting(None, choices=OBJECTIVES)
    """Objectives to train beside the run, from the same base with the same steps, for the table; sft, say."""
    report_to: str = setting("tensorboard", harmless=True)
    """tensorboard, wandb, trackio, all (that are installed) or none. wandb and trackio need the extra of their name."""
    tracker_project_name: str = setting("spin-diffusion", harmless=True)
    """The trackers' project: a name, not a path."""
    push_to_hub: bool = setting(False, harmless=True)
    """Upload the trained weights or adapter, the model card and the report at the end."""
    hub_model_id: str | None = setting(None, harmless=True)
    """Repository to upload to; default: the output folder's name."""
    debug: bool = setting(False, harmless=True)
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        file_name(self.tracker_project_name, "--tracker_project_name")
