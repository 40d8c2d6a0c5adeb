"""What the states of a round are given: what all rounds of a run share, what is fixed of this one, what they return."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator

from spin_diffusion.samples.candidates import Candidates
from spin_diffusion.samples.pairs import Pairs, Side, Visited, find_visited, open_pairs
from spin_diffusion.samples.sample import Row
from spin_diffusion.samples.scores import KeepsScores
from spin_diffusion.samples.shards import Part, rows_in, shards
from spin_diffusion.selfplay.game import FixedDraws, Game
from spin_diffusion.selfplay.looks import Judge, Preview, Took
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.opponents import OPPONENTS, Mixture
from spin_diffusion.selfplay.record import (
    CHOICES,
    EMA,
    ENCODED,
    HELD_OUT,
    SAMPLES,
    SCORES,
    RoundFields,
    RoundRecord,
    SelfRecord,
    State,
    replay,
)
from spin_diffusion.selfplay.round_settings import RoundSettings, source_of
from spin_diffusion.selfplay.train_settings import TrainSettings, of_round, pairs_visited
from spin_diffusion.store.files import read_rows
from spin_diffusion.store.hashes import file_hashes
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.progress import Progress


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

    @property
    def samples(self) -> int:
        """The most pairs that it is shown; 0 = none, and it is not asked."""
        ...

    @property
    def stops(self) -> bool:
        """Whether the run ends where its state is "warn"."""
        ...

    def __call__(self, real: list[Row], generated: list[Row]) -> dict[str, Any]:
        """Stored rows, pair by pair -> a JSON object with `state` ("ok", "warn", "not run") and `lines` to print."""
        ...


@dataclass(frozen=True)
class Costs:
    """What a game's phases take in floating-point operations.

    Attributes:
        flops: (round, phase, samples) -> their FLOPs, a multiplication and an addition being two; None = not known.
        matrix_rate: FLOP/s of large matrix products on one process's device, in the run's precision.
    """

    flops: Callable[[int, str, int], int | None]
    matrix_rate: float


@dataclass
class SelfPlay:
    """What all rounds of a run share, and whose weights the game holds now."""

    game: Game
    data: Path
    """Folder of the real samples that `prepare` wrote."""
    output_dir: Path
    rounds: RoundSettings
    training: TrainSettings
    accelerator: Accelerator
    evaluate: Evaluate | None = None
    progress: Progress = field(default_factory=Progress)
    held_out: Path | None = None
    """As `data`, of real samples that are never trained on. The opponent draws for them too, and every round is asked
    how well it tells the two apart."""
    candidates: Candidates | None = None
    """Where the opponent plays, its own samples make the pairs; needs num_generated = 1."""
    probe: Probe | None = None
    """Is shown pairs of each round that has an opponent's samples; what it says is kept as `shortcut`."""
    costs: Costs | None = None
    judge: Judge | None = None
    """Judges the steps of a round where --select_by names anything but the gap."""
    preview: Preview | None = None
    """Draws previews while a round is trained."""
    reached: Callable[["Round", State], None] | None = None
    """Is told of each state once it is committed, by the main process."""
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
            self.player_is(folder)

    def player_is(self, folder: Path | None) -> None:
        """The player's weights were saved in `folder`; None = they are about to change."""
        self.player = folder
        if isinstance(self.game, KeepsScores):
            self.opponent = None  # such a game may have one set of weights for both

    def folder(self, k: int) -> Path:
        """Where round k's player lies, or that which round 1 starts from; Path() for the base."""
        return self.output_dir / f"round-{k}" if k else self.start


@dataclass(frozen=True)
class RealSamples:
    """Real samples, and where the opponent's samples for them go in a round."""

    data: Path
    folder: Path
    part: Part
    title: str


@dataclass(frozen=True)
class StepResult:
    """What a state of a round has done."""

    fields: RoundFields = field(default_factory=RoundFields)
    """What it leaves in the record."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files that it made, by their paths relative to the run's folder."""
    worked_on: int | None = None
    """Samples that this process worked on; None = nobody counted them."""
    within: dict[str, Took] = field(default_factory=dict)
    """What other phases of the ledger took meanwhile, by their names; the same ones on every process."""


class Round:
    """What is fixed of round k before it is played.

    Attributes:
        source: where the generated sides come from.
        parent: the round whose player this one goes on with; 0 = the base.
        mixture: the selves that draw; `anchors`: those whose scores the player's are measured from.
        sets: the real samples to train on, and after them the held-out ones, if the round has any.
    """

    def __init__(self, run: SelfPlay, k: int, promoted: list[int]) -> None:
        self.run, self.k = run, k
        self.game, self.accelerator, self.settings = run.game, run.accelerator, run.rounds
        self.directory = run.output_dir / f"round-{k}"
        self.objective = of_round(self.settings.objective, k)
        self.source = source_of(self.settings, self.objective)
        self.candidates = run.candidates if self.source == "opponent" else None
        self.title = f"{title_of(self.objective)} round {k}"
        self.parent = promoted[-1] if promoted else 0
        self.mixture = OPPONENTS[self.settings.opponent](promoted)
        self.anchors: Mixture = {0: 1.0} if self.settings.anchor == "base" else self.mixture
        if not isinstance(self.game, KeepsScores):
            self.anchors = {max(self.anchors): 1.0}  # one self has to be there for every score: the newest
        part = Part((k - 1) % self.settings.real_parts, self.settings.real_parts)
        self.sets = [RealSamples(run.data, self.directory, part, self.title)]
        if run.held_out is not None and self.source != "data":  # held-out samples come without worse ones
            held_out = RealSamples(run.held_out, self.directory / HELD_OUT, Part(), f"{self.title}: held out")
            self.sets.append(held_out)

    @property
    def scores_kept(self) -> bool:
        """Whether the opponent's scores are computed before the player is trained."""
        return isinstance(self.game, KeepsScores) or self.fixed_draws > 0

    @property
    def fixed_draws(self) -> int:
        """Draws of its own that each pair has; 0 = every visit of a pair is a new draw."""
        return self.game.fixed_draws if isinstance(self.game, FixedDraws) else 0

    def seat(self, k: int, record: RoundRecord) -> str:
        """Self k as the opponent, which must be the one that the round was started with; its hash."""
        present = self.run.seat_opponent(k)
        selves = [*record["opponent"]["members"], *record["opponent"]["anchors"]]
        expected = next(entry["hash"] for entry in selves if entry["round"] == k)
        if present != expected:
            where = f"round-{k}" if k else "the base"
            raise InputError(
                f"{self.directory} was started against other weights of {where} ({expected[:12]}..., now "
                f"{present[:12]}...): restore them, or {replay(self.directory)}"
            )
        return present

    def visits(self) -> int:
        """How many real samples the opponent draws for: those that training visits. It draws for all where it draws
        candidates, of which only a judge knows which make a pair, and where each pair has draws of its own."""
        pairs = self.sets[0].part.count(self.sets[0].data)
        if self.candidates is not None or self.fixed_draws:
            return pairs
        return pairs_visited(self.run.training, self.k, pairs, self.accelerator.num_processes)

    def visited(self, samples: RealSamples, visits: int) -> Visited:
        """The samples of a set that the opponent draws for: all held-out ones, of the others so many as are visited."""
        if samples is not self.sets[0]:
            visits = samples.part.count(samples.data)
        return find_visited(samples.data, samples.part, visits, self.settings.seed, self.k)

    def hashes(self, name: str) -> dict[str, str]:
        """The hashes of all files in the folders of this name, called on all processes once they are written."""
        self.accelerator.wait_for_everyone()
        folders = [samples.folder / name for samples in self.sets]
        there = [folder for folder in folders if folder.is_dir()]
        return file_hashes(there, self.run.output_dir, self.accelerator)

    def pairs(self, record: RoundRecord, samples: RealSamples, scored: bool = True) -> Pairs:
        """The pairs of a round's samples.

        Args:
            scored: with the opponent's scores, where they are kept.
        """

        def scores(side: str) -> Path | None:
            return samples.folder / SCORES / side if self.scores_kept and scored else None

        generated = {
            "opponent": Side(samples.folder / ENCODED, scores("generated")),
            "data": Side(samples.data / ENCODED, scores("generated"), "loser_"),
            "none": None,
        }[self.source]
        if self.source == "opponent":
            self._check_samples(record, samples.folder / SAMPLES)
        return open_pairs(
            samples.data,
            Side(samples.data / ENCODED, scores("real")),
            generated,
            samples.part,
            self.settings.num_generated,
            samples.folder / CHOICES if self.candidates is not None else None,
            self.fixed_draws,
            self.visited(samples, record["visits"]) if self.source == "opponent" else None,
        )

    def _check_samples(self, record: RoundRecord, folder: Path) -> None:
        """A sample is trained on only when one of this round's opponents drew it."""
        members = {entry["hash"] for entry in record["opponent"]["members"]}
        for path in shards(folder, ".parquet"):
            for row in read_rows(path, columns=["id", "opponent"]) if rows_in(path) else []:
                if row["opponent"] not in members:
                    raise InputError(
                        f"{path}: sample {row['id']} was drawn by another opponent ({str(row['opponent'])[:12]}) than "
                        f"round {self.k}'s ({', '.join(sorted(digest[:12] for digest in members))}): "
                        f"{replay(self.directory)}"
                    )


def mixture_hash(selves: list[SelfRecord]) -> str:
    """One hash for the opponent: its own, or one over the hashes and weights of a mixture's selves."""
    if len(selves) == 1:
        return selves[0]["hash"]
    return hashlib.sha256(json.dumps(selves, sort_keys=True).encode()).hexdigest()
