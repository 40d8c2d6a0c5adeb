"""What the rounds share: the game with its models, the data, the folders, and who judges a player."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator

from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.samples.sample import Row
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.ledger import Costs
from spin_diffusion.selfplay.round_settings import RoundSettings
from spin_diffusion.selfplay.train_settings import TrainSettings
from spin_diffusion.store.progress import Progress

EMA = "ema"


@dataclass(frozen=True)
class Judgement:
    """What the evaluation of a round says of its player."""

    metrics: dict[str, Any]
    promote: bool = True
    """False = the player is set aside, and its opponent plays the next round."""
    reason: str = ""
    """Why it is not promoted, in one line."""


Evaluate = Callable[[int, Path, int], Judgement]


@runtime_checkable
class Probe(Protocol):
    """Looks at a round's real and generated samples before its player is trained."""

    samples: int
    """The most pairs that it is shown; 0 = none, and it is not asked."""
    stops: bool
    """Whether the run ends where its state is "warn"."""

    def __call__(self, real: list[Row], generated: list[Row]) -> dict[str, Any]:
        """Stored rows, pair by pair -> a JSON object with `state` ("ok", "warn", "not run") and `lines` to print."""
        ...


@dataclass
class Table:
    """What all rounds of a run share, and whose weights the game holds now."""

    game: Game
    data: Path
    held_out: Path | None
    output_dir: Path
    rounds: RoundSettings
    training: TrainSettings
    accelerator: Accelerator
    evaluate: Evaluate | None
    progress: Progress
    candidates: Candidates | None = None
    probe: Probe | None = None
    costs: Costs | None = None
    run_dir: Path | None = None
    """The run's whole folder, whose bytes the ledgers count; None = output_dir."""
    start: Path = Path()
    """The folder with the player that round 1 starts from; Path() = the base."""
    opponent: tuple[Path, str] | None = None
    """The folder whose weights are the opponent's now, and their hash; None = unknown."""
    player: Path | None = None
    """Folder that holds the player's weights; Path() = the base, None = no folder does."""

    def seat_opponent(self, k: int) -> str:
        """Round k's self (0 = the one that round 1 starts from) as the opponent; its hash."""
        folder = self.folder(k)
        if k and self.rounds.opponent == "ema":
            folder = folder / EMA
        if self.opponent is None or self.opponent[0] != folder:
            self.seat_player(folder)
            self.game.promote()
            self.opponent = (folder, self.game.opponent_hash())
        return self.opponent[1]

    def opponent_has_moved(self) -> None:
        """The opponent's weights are no longer those of any folder."""
        self.opponent = None

    def seat_player(self, folder: Path) -> None:
        """The weights in `folder` as the player."""
        if self.player != folder:
            self.game.restore(folder if folder != Path() else None)
            self._player_is(folder)

    def before_training(self) -> None:
        """The player's weights are about to change."""
        self._player_is(None)

    def after_training(self, folder: Path) -> None:
        """The player's weights were saved in `folder`."""
        self._player_is(folder)

    def _player_is(self, folder: Path | None) -> None:
        self.player = folder
        if self.game.keeps_scores:
            self.opponent = None  # such a game may have one set of weights for both

    def folder(self, k: int) -> Path:
        """Where round k's player lies, or that which round 1 starts from; Path() for the base."""
        return self.output_dir / f"round-{k}" if k else self.start
