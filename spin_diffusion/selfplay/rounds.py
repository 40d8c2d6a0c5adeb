"""The rounds of self-play, and what is on the disk after each of their states.

PLANNED -> OPPONENT -> GENERATED -> CACHED -> TRAINED -> EVALUATED -> PROMOTED | REJECTED. A state is committed by
replacing the round's `round.json` once the state's files are complete and hashed. Running again goes on at the first
state that is not committed, so the same command starts, resumes and finishes a run.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from spin_diffusion.input_error import InputError
from spin_diffusion.selfplay.game import Game
from spin_diffusion.selfplay.objectives import OBJECTIVES, bind
from spin_diffusion.selfplay.opponents import OPPONENTS
from spin_diffusion.selfplay.progress import Progress
from spin_diffusion.selfplay.run_dir import (
    commit,
    file_hashes,
    part_of,
    read_json,
    rows_metadata,
    seed_from,
    settle,
    verify_hashes,
    weights_hash,
    write_json,
)
from spin_diffusion.selfplay.samples import data_manifest, draw_shards, encode_shards, open_pairs, shards
from spin_diffusion.selfplay.train import Pairs, RoundPlan, TrainSettings, remove_checkpoints, train

STATES = ("PLANNED", "OPPONENT", "GENERATED", "CACHED", "TRAINED", "EVALUATED", "PROMOTED")

FINAL = ("PROMOTED", "REJECTED")


@dataclass(frozen=True)
class Judgement:
    """What the evaluation of a round says of its player."""

    metrics: dict[str, Any]
    promote: bool = True
    """False = the player is set aside, and its opponent plays the next round."""
    reason: str = ""
    """Why it is not promoted, in one line."""


Evaluate = Callable[[int, Path, int], Judgement]
"""(round, folder, the round of its opponent or 0) -> what the player is worth. Resumable in the folder."""


@dataclass(frozen=True)
class RoundSettings:
    """The game that is played. A list holds one value per round; when it is shorter, its last value repeats."""

    rounds: int = 3
    """Rounds of self-play, counted from 1."""
    objective: Literal["spin", "space", "dpo", "sft"] = "spin"
    """spin and space play the opponent; dpo uses the data set's own worse images; sft uses none."""
    beta: float | list[float] = 5000.0
    """Temperature on r. In the convention of SPIN-Diffusion and Diffusion-DPO (2000 to 5000)."""
    mu: float = 1.0
    """Generated samples per real one, in the objective `space`."""
    opponent: Literal["latest", "base"] = "latest"
    """Which earlier self draws the generated samples and anchors the score."""
    samples_per_shard: int = 64
    """Generated samples per file; what a killed process loses at most."""
    seed: int = 0
    """Seed of everything random in the run."""


def of_round(value: Any, round_: int) -> Any:
    """A setting's value in a round: a list holds one per round and repeats its last."""
    return value[min(round_, len(value)) - 1] if isinstance(value, list) else value


def play(
    game: Game,
    data: Path,
    output_dir: Path,
    rounds: RoundSettings,
    training: TrainSettings,
    accelerator: Accelerator,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Play all rounds and return their records; a finished run returns at once.

    Args:
        data: folder of the real samples that `prepare` wrote.
        output_dir: gets `round-1/`, `round-2/`, ... and `unet/` (or what the game saves) of the last promoted round.
    """
    progress = progress or Progress()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        settle(output_dir)
    accelerator.wait_for_everyone()
    records: list[dict[str, Any]] = []
    for k in range(1, rounds.rounds + 1):
        promoted = [record["round"] for record in records if record["state"] == "PROMOTED"]
        play_round = _Round(k, promoted, game, data, output_dir, rounds, training, accelerator, evaluate, progress)
        records.append(play_round.run())
    return records


@dataclass
class _Round:
    """One round: its record on the disk and the steps that are still to be taken."""

    k: int
    promoted: list[int]
    game: Game
    data: Path
    output_dir: Path
    rounds: RoundSettings
    training: TrainSettings
    accelerator: Accelerator
    evaluate: Evaluate | None
    progress: Progress

    def __post_init__(self) -> None:
        self.directory = self.output_dir / f"round-{self.k}"
        self.title = f"{self.rounds.objective} round {self.k}"
        self.parent = self.promoted[-1] if self.promoted else 0
        self.anchor = OPPONENTS[self.rounds.opponent](self.k, self.promoted)
        self.record = self._read()
        self.ready = False

    def run(self) -> dict[str, Any]:
        """Take every step that is not committed yet."""
        # All have read the record before one of them changes it: otherwise a late one would skip a step
        self.accelerator.wait_for_everyone()
        data_hash = data_manifest(self.data)["hash"]
        if self.record and self.record["data_hash"] != data_hash:
            raise InputError(
                f"{self.directory} was trained on other data (hash {self.record['data_hash'][:12]}, now "
                f"{data_hash[:12]}): restore {self.data}, or start in another --output_dir"
            )
        if self.finished:
            verify_hashes(self._unremoved(self.record["files"]), self.output_dir)
            self._clean()
            return self.record
        if not self._reached("PLANNED"):
            self._commit("PLANNED", round=self.k, parent=self.parent, data_hash=data_hash, files={}, seconds={})
        for state, step in (
            ("OPPONENT", self._choose_opponent),
            ("GENERATED", self._generate),
            ("CACHED", self._cache),
            ("TRAINED", self._train),
            ("EVALUATED", self._evaluate),
            ("PROMOTED", self._promote),
        ):
            if not self._reached(state):
                started = time.perf_counter()
                self._prepare_models()
                results = step()
                seconds = self.record["seconds"] | {state.lower(): round(time.perf_counter() - started, 3)}
                files = self.record["files"] | results.pop("files", {})
                self._commit(results.pop("state", state), seconds=seconds, files=files, **results)
        self._clean()
        return self.record

    @property
    def finished(self) -> bool:
        return bool(self.record) and self.record["state"] in FINAL

    # The record

    def _read(self) -> dict[str, Any]:
        path = self.directory / "round.json"
        return read_json(path) if path.is_file() else {}

    def _reached(self, state: str) -> bool:
        return self.finished or bool(self.record) and STATES.index(state) <= STATES.index(self.record["state"])

    def _commit(self, state: str, **fields: Any) -> None:
        self.record = self.record | fields | {"state": state}
        if self.accelerator.is_main_process:
            write_json(self.directory / "round.json", self.record)
        self.accelerator.wait_for_everyone()

    def _unremoved(self, files: dict[str, str]) -> dict[str, str]:
        """The files that a finished round still has: its latents are removed, they can be made again."""
        return {name: digest for name, digest in files.items() if "/latents/" not in name}

    def _clean(self) -> None:
        """Remove what a finished round does not need: latents, which the samples give again, and checkpoints."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.directory / "latents", ignore_errors=True)
            if not self.training.keep_checkpoints:
                remove_checkpoints(self.directory)
        self.accelerator.wait_for_everyone()

    # The steps

    def _prepare_models(self) -> None:
        """Player and opponent as the round's beginning has them; once, and only when a step needs them."""
        if self.ready:
            return
        self.ready = True
        if self._reached("OPPONENT"):
            verify_hashes(self.record["files"], self.output_dir)
        self.game.restore(self._player_dir(self.anchor))
        self.game.promote()
        if self._reached("OPPONENT"):
            assert weights_hash(self.game.opponent) == self.record["opponent"]["hash"], (
                f"round {self.k}: the opponent is not the one that the round was started with"
            )
        if self._reached("TRAINED"):
            self.game.restore(self.directory)
        elif self.anchor != self.parent:
            self.game.restore(self._player_dir(self.parent))

    def _player_dir(self, k: int) -> Path | None:
        return self.output_dir / f"round-{k}" if k else None

    def _choose_opponent(self) -> dict[str, Any]:
        return {"opponent": {"round": self.anchor, "hash": weights_hash(self.game.opponent)}}

    def _generate(self) -> dict[str, Any]:
        source = OBJECTIVES[self.rounds.objective].generated
        if source != "opponent":
            return {"generated": source}
        opponent = self.record["opponent"]["hash"]
        draw_shards(
            self.data,
            self.directory / "samples",
            lambda rows, done: self.game.generate(
                rows, [seed_from(self.rounds.seed, self.k, row["id"], 0) for row in rows], done
            ),
            {"opponent": opponent, "data": self.record["data_hash"], "round": str(self.k)},
            self.accelerator,
            self.progress.phase(f"{self.title}: generate", data_manifest(self.data)["rows"]),
        )
        return {"generated": source, "files": self._hashes(self.directory / "samples")}

    def _cache(self) -> dict[str, Any]:
        if OBJECTIVES[self.rounds.objective].generated != "opponent":
            return {}
        encode_shards(
            self.directory / "samples",
            self.directory / "latents",
            self.game,
            self.accelerator,
            self.progress.phase(f"{self.title}: encode", data_manifest(self.data)["rows"]),
        )
        return {"files": self._hashes(self.directory / "latents")}

    def _train(self) -> dict[str, Any]:
        before = weights_hash(self.game.opponent)
        plan = RoundPlan(
            name=f"{self.rounds.objective}/round-{self.k}",
            round_=self.k,
            seed=self.rounds.seed,
            steps=of_round(self.training.max_train_steps, self.k),
            learning_rate=of_round(self.training.learning_rate, self.k),
            warmup_steps=of_round(self.training.lr_warmup_steps, self.k),
            beta=of_round(self.rounds.beta, self.k),
            loss=bind(self.rounds.objective, beta=of_round(self.rounds.beta, self.k), mu=self.rounds.mu),
            anchored_at_player=self.anchor == self.parent,
        )
        bar = self.progress.phase(f"{self.title}: train", plan.steps)
        training = train(
            self.game,
            self._pairs(),
            plan,
            # Without a generated side there is nothing to tell apart
            replace(self.training, stop_at_saturation=None) if self.record["generated"] == "none" else self.training,
            self.accelerator,
            self.directory,
            lambda done, total, text: bar(done, text),
        )
        assert weights_hash(self.game.opponent) == before == self.record["opponent"]["hash"], (
            f"round {self.k}: the opponent changed while the player was trained"
        )
        how = ", stopped early: its pairs are told apart" if training["stopped_early"] else ""
        self.accelerator.print(
            f"{self.title}: {training['steps']} steps{how}; over the last ones r_real {training['r_real']:+.2e}, "
            f"r_generated {training['r_generated']:+.2e}, accuracy {training['implicit_accuracy']:.2f}"
        )
        saved = self.game.save(self.directory)
        self.accelerator.wait_for_everyone()
        return {"training": training, "files": file_hashes(saved, self.output_dir)}

    def _pairs(self) -> Pairs:
        source = OBJECTIVES[self.rounds.objective].generated
        generated = {
            "opponent": (self.directory / "latents", ""),
            "data": (self.data / "latents", "loser_"),
            "none": (None, ""),
        }[source]
        if source == "opponent":
            self._check_samples()
        return open_pairs(self.data, generated[0], generated[1])

    def _check_samples(self) -> None:
        """A sample is trained on only when this round's opponent drew it."""
        for path in shards(self.directory / "samples", ".parquet"):
            opponent = rows_metadata(path).get("opponent")
            if opponent != self.record["opponent"]["hash"]:
                raise InputError(
                    f"{path} was drawn by another opponent ({str(opponent)[:12]}) than round {self.k}'s "
                    f"({self.record['opponent']['hash'][:12]}): delete {path.parent} and round.json beside it"
                )

    def _evaluate(self) -> dict[str, Any]:
        if self.evaluate is None:
            return {"metrics": {}, "rejected_because": None}
        judged = self.evaluate(self.k, self.directory / "evaluation", self.parent)
        self.accelerator.wait_for_everyone()
        # Media are not hashed here: the evaluation's own records hold their hashes
        records = [
            path
            for path in sorted((self.directory / "evaluation").rglob("*"))
            if path.suffix in (".json", ".jsonl", ".parquet")
        ]
        return {
            "metrics": judged.metrics,
            "rejected_because": None if judged.promote else judged.reason,
            "files": file_hashes(records, self.output_dir),
        }

    def _promote(self) -> dict[str, Any]:
        reason = self.record["rejected_because"]
        if reason is not None:
            self.accelerator.print(
                f"round {self.k} is rejected ({reason}): the player of "
                f"{f'round {self.parent}' if self.parent else 'the base'} plays on"
            )
            return {"state": "REJECTED", "decision": "rejected"}
        if self.accelerator.is_main_process:
            for path in (self.directory / name for name in self._saved_names()):
                target = self.output_dir / path.name
                shutil.copytree(path, part_of(target), dirs_exist_ok=True)
                commit(target)
        return {"decision": "promoted"}

    def _saved_names(self) -> list[str]:
        """Top-level names in the round's folder that `game.save` wrote."""
        prefix = f"{self.directory.name}/"
        names = {name.removeprefix(prefix).split("/")[0] for name in self.record["files"] if name.startswith(prefix)}
        return sorted(names - {"samples", "latents", "evaluation"})

    def _hashes(self, directory: Path) -> dict[str, str]:
        self.accelerator.wait_for_everyone()
        return file_hashes([directory], self.output_dir)
