"""One round of self-play, state by state.

A state is committed by replacing the round's `round.json` once the state's files are complete and hashed. Running again
goes on at the first state that is not committed.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from spin_diffusion.samples.candidates import CHOICES, chosen_samples, judge_shards, summary
from spin_diffusion.samples.pairs import Pairs
from spin_diffusion.samples.real import data_manifest
from spin_diffusion.samples.sample import KEPT, Row
from spin_diffusion.samples.scores import mix_scores, score_draws, score_shards
from spin_diffusion.samples.shards import (
    ENCODED,
    Part,
    draw_shards,
    encode_shards,
    merge_shards,
    rows_in,
    shards,
    some_pairs,
)
from spin_diffusion.samples.stored_pairs import Side, open_pairs
from spin_diffusion.selfplay.checkpoints import remove_checkpoints
from spin_diffusion.selfplay.gap import gap_text, held_out_gap, is_above_zero
from spin_diffusion.selfplay.ledger import Stopwatch, everywhere
from spin_diffusion.selfplay.objective_names import title_of
from spin_diffusion.selfplay.objectives import Loss, bind, with_anchor
from spin_diffusion.selfplay.opponents import OPPONENTS, Mixture, describe, member
from spin_diffusion.selfplay.record import FINAL, STATES, read_record, replay
from spin_diffusion.selfplay.round_settings import source_of
from spin_diffusion.selfplay.table import EMA, Probe, Table
from spin_diffusion.selfplay.tracking import log_phase
from spin_diffusion.selfplay.train import RoundPlan, train
from spin_diffusion.selfplay.train_settings import check_batch, of_round, steps_of_round
from spin_diffusion.selfplay.trainee import Average, trained_parameters
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.machine import trouble_of
from spin_diffusion.store.progress import tell
from spin_diffusion.store.run_dir import (
    Damaged,
    commit,
    file_hashes,
    find_damage,
    is_shard,
    is_whole,
    part_of,
    read_rows,
    remove_files,
    seed_from,
    settle,
    tell_remade,
    verify_hashes,
    write_file,
    write_json,
)

CACHED = STATES.index("CACHED")
SAMPLES, SCORES, HELD_OUT, EVALUATION = "samples", "scores", "held_out", "evaluation"
BETWEEN = "between"
"""Of `seconds`: what no step took."""
DRAWN_BY, SCORED_BY = "drawn_by", "scored_by"
"""What each member of a mixture did by itself; removed when the round is finished."""


@dataclass(frozen=True)
class _Samples:
    """Real samples, and where the opponent's samples for them go in a round."""

    data: Path
    folder: Path
    part: Part
    title: str


class Round:
    """One round: its record on the disk and the steps that are still to be taken."""

    def __init__(self, table: Table, k: int, promoted: list[int]) -> None:
        self.table, self.k = table, k
        self.game, self.accelerator, self.rounds = table.game, table.accelerator, table.rounds
        self.directory = table.output_dir / f"round-{k}"
        self.objective = of_round(self.rounds.objective, k)
        self.source = source_of(self.rounds, self.objective)
        self.candidates = table.candidates if self.source == "opponent" else None
        self.title = f"{title_of(self.objective)} round {k}"
        self.parent = promoted[-1] if promoted else 0
        self.mixture = OPPONENTS[self.rounds.opponent](promoted)
        self.anchors: Mixture = {0: 1.0} if self.rounds.anchor == "base" else self.mixture
        if not self.game.keeps_scores:
            self.anchors = {max(self.anchors): 1.0}  # one self has to be there for every score: the newest
        part = Part((k - 1) % self.rounds.real_parts, self.rounds.real_parts)
        self.sets = [_Samples(table.data, self.directory, part, self.title)]
        if table.held_out is not None and self.source != "data":  # held-out samples come without worse ones
            self.sets.append(_Samples(table.held_out, self.directory / HELD_OUT, Part(), f"{self.title}: held out"))
        self.record = read_record(self.directory)

    def run(self) -> dict[str, Any]:
        """Take every step that is not committed yet. What a full disk leaves half-written is removed."""
        try:
            return self._run()
        except Exception as error:
            if self.accelerator.is_main_process and trouble_of(error) is not None:
                settle(self.directory)
            raise

    def _run(self) -> dict[str, Any]:
        self._marked = time.perf_counter()
        # All have read the record before one of them changes it: otherwise a late one would skip a step
        self.accelerator.wait_for_everyone()
        data_hash = data_manifest(self.table.data)["hash"]
        if self.record and self.record["data_hash"] != data_hash:
            raise InputError(
                f"{self.directory} was trained on other data (hash {self.record['data_hash'][:12]}, now "
                f"{data_hash[:12]}): restore {self.table.data}, or start in another --output_dir"
            )
        while self.record and (damage := self._damage()):
            self._mend(damage)
        if not self.finished:
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
                    if state == "TRAINED":
                        self._probe()
                    self._take(state, step)
        self._clean()
        return self.record

    def _take(self, state: str, step: Callable[[], dict[str, Any]], phase: str | None = None) -> None:
        """One step and its commit, with what it took and what lay between it and the one before.

        Args:
            phase: its name in the ledger; None = the state's.
        """
        stopwatch, started, phase = Stopwatch(self.accelerator), time.perf_counter(), phase or state.lower()
        between = self.record["seconds"].get(BETWEEN, 0.0) + started - self._marked
        results = step()
        self._marked = time.perf_counter()
        seconds = self._marked - started
        samples = results.pop("worked_on", None)
        samples = samples if samples is None else everywhere(samples, self.accelerator)
        costs = self.table.costs
        flops = costs.flops(self.k, phase, samples) if costs is not None and samples else None
        rate = costs.matrix_rate if costs is not None else None
        entry = stopwatch.entry(seconds, samples, flops, rate, self.table.run_dir or self.table.output_dir)
        self._commit(
            results.pop("state", state),
            seconds=self.record["seconds"] | {phase: entry["seconds"], BETWEEN: round(between, 3)},
            ledger=self.record.get("ledger", {}) | {phase: entry},
            files=self.record["files"] | results.pop("files", {}),
            **results,
        )
        log_phase(title_of(self.objective), self.k, phase, entry, self.accelerator)

    @property
    def scores_kept(self) -> bool:
        """Whether the opponent's scores are computed before the player is trained."""
        return self.game.keeps_scores or self.game.fixed_draws > 0

    @property
    def finished(self) -> bool:
        """Whether it was promoted or rejected."""
        return bool(self.record) and self.record["state"] in FINAL

    # The record

    def _reached(self, state: str) -> bool:
        return self.finished or bool(self.record) and STATES.index(state) <= STATES.index(self.record["state"])

    def _commit(self, state: str, **fields: Any) -> None:
        self.record = self.record | fields | {"state": state}
        if self.accelerator.is_main_process:
            write_json(self.directory / "round.json", self.record, sealed=True)
        self.accelerator.wait_for_everyone()

    def _damage(self) -> dict[str, str]:
        """What is wrong with the files that are still needed. A trained player needs no samples any more; that they are
        not there, or not as they were, is said."""
        found = [{}]
        if self.accelerator.is_main_process:
            damage = find_damage(self._unremoved(self.record["files"]), self.table.output_dir)
            needed = {name for name in damage if not self._reached("TRAINED") or STATES.index(_made_in(name)) > CACHED}
            if rest := damage.keys() - needed:
                tell(f"{self.title}: {len(rest)} files such as {min(rest)} are missing or damaged; it is trained and "
                     "needs them no more")  # fmt: skip
            found = [{name: damage[name] for name in damage if name in needed}]
        return broadcast_object_list(found)[0]

    def _unremoved(self, files: dict[str, str]) -> dict[str, str]:
        """The files that a round still has as they were: a finished one has removed what its samples give again, and
        its evaluation may have been made anew by other scorers."""
        removed = {ENCODED, KEPT, EVALUATION} if self.finished else {EVALUATION}
        return {name: digest for name, digest in files.items() if not removed & set(Path(name).parent.parts)}

    def _mend(self, damage: dict[str, str]) -> None:
        """Go back to the state before the one that made the first of the damaged files, which makes them anew.

        Raises:
            Damaged: the player of a finished round.
        """
        first = min(STATES.index(_made_in(name)) for name in damage)
        errors = [Damaged(self.table.output_dir / name, damage[name], replay(self.directory)) for name in damage]
        if self.finished:
            raise errors[0]
        if self.accelerator.is_main_process:
            for error in errors:
                tell_remade(error)
                for path in self._resting_on(error.path):
                    path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        files = self.record["files"]
        kept = {name: files[name] for name in files if STATES.index(_made_in(name)) < first}
        self._commit(STATES[first - 1], files=kept)

    def _resting_on(self, path: Path) -> list[Path]:
        """A damaged file, and of samples what was made of them: files of the same shard."""
        if _made_in(path.relative_to(self.table.output_dir).as_posix()) != "GENERATED":
            return [path]
        folder = path.parent.parent
        names = (SAMPLES, KEPT, CHOICES, ENCODED, f"{SCORES}/real", f"{SCORES}/generated")
        return [found for name in names for found in (folder / name).glob(f"{path.stem}.*")]

    def _clean(self) -> None:
        """Remove what a finished round does not need: encodings, which the samples give again, what was kept for its
        training alone, and checkpoints."""
        if self.accelerator.is_main_process:
            for samples in self.sets:
                for name in (ENCODED, KEPT, DRAWN_BY, SCORED_BY):
                    remove_files(samples.folder / name, is_shard)
            if not self.table.training.keep_checkpoints:
                remove_checkpoints(self.directory)
        self.accelerator.wait_for_everyone()

    # The steps

    def _choose_opponent(self) -> dict[str, Any]:
        hashes = {k: self.table.seat_opponent(k) for k in sorted({*self.mixture, *self.anchors})}

        def described(selves: Mixture) -> list[dict[str, Any]]:
            return [{"round": k, "weight": weight, "hash": hashes[k]} for k, weight in sorted(selves.items())]

        members, anchors = described(self.mixture), described(self.anchors)
        return {
            "opponent": {
                "rule": self.rounds.opponent,
                "round": max(self.anchors),
                "hash": _hash_of(members),
                "members": members,
                "anchors": anchors,
            }
        }

    def _seat(self, k: int) -> str:
        """Self k as the opponent, which must be the one that the round was started with; its hash."""
        found = self.table.seat_opponent(k)
        known = [*self.record["opponent"]["members"], *self.record["opponent"]["anchors"]]
        expected = next(self_["hash"] for self_ in known if self_["round"] == k)
        if found != expected:
            where = f"round-{k}" if k else "the base"
            raise InputError(
                f"{self.directory} was started against other weights of {where} ({expected[:12]}..., now "
                f"{found[:12]}...): restore them, or {replay(self.directory)}"
            )
        return found

    def _generate(self) -> dict[str, Any]:
        if self.source != "opponent":
            return {"generated": self.source}
        metadata = {
            "opponent": self.record["opponent"]["hash"], "data": self.record["data_hash"], "round": str(self.k),
            "sampler": self.game.sampler_settings,
        }  # fmt: skip
        judge = None
        if self.candidates is not None:
            metadata |= self.candidates.metadata
            self._check_judge(self.candidates.judge)
            judge = self.candidates.load_judge()  # before the drawing: what it lacks is said now, not hours later
        drawn = 0
        for samples in self.sets:
            if len(self.mixture) == 1:
                drawn += self._draw(samples, samples.folder / SAMPLES, max(self.mixture), metadata)
                continue
            by_member = {k: samples.folder / DRAWN_BY / str(k) for k in self.mixture}
            for k, folder in by_member.items():
                drawn += self._draw(samples, folder, k, metadata)
            merge_shards(
                list(by_member.values()), samples.folder / SAMPLES, lambda row: (row["place"], row["k"]), metadata,
                self.accelerator,
            )  # fmt: skip
        made: dict[str, Any] = {
            "generated": self.source,
            "drawn": self._drawn_by(),
            "worked_on": drawn,
            "files": self._hashes(SAMPLES) | self._hashes(KEPT),
        }
        if self.candidates is None or judge is None:
            return made
        for samples in self.sets:
            bar = self.table.progress.phase(f"{samples.title}: judge the candidates", self._num_drawn(samples))
            judge_shards(
                samples.folder / SAMPLES, samples.folder / CHOICES, judge, metadata | {"judge": self.candidates.judge},
                self.accelerator, bar,
            )  # fmt: skip
        return made | {"candidates": self._judged(), "files": made["files"] | self._hashes(CHOICES)}

    def _check_judge(self, judge: str) -> None:
        """One judge for all rounds: InputError when an earlier one was played with another."""
        for earlier in range(1, self.k):
            before = read_record(self.table.output_dir / f"round-{earlier}").get("candidates", {})
            if before.get("judge", judge) != judge:
                raise InputError(
                    f"round {self.k} would have another judge of candidates than round {earlier} (then "
                    f"{before['judge']}, now {judge}): restore the file, or start in another --output_dir"
                )

    def _drawn_by(self) -> dict[str, int]:
        """How many of the samples to train on each self drew, by its round; the samples name their own."""
        drawn = Counter(
            row["opponent"]
            for path in shards(self.sets[0].folder / SAMPLES, ".parquet")
            for row in (read_rows(path, columns=["opponent"]) if rows_in(path) else [])
        )
        return {str(found["round"]): drawn[found["hash"]] for found in self.record["opponent"]["members"]}

    def _judged(self) -> dict[str, Any]:
        """What the choices for the pairs to train on come to; InputError when too few are left."""
        assert self.candidates is not None
        found = summary(self.directory / CHOICES)
        ties = f"{found['ties_left_out']:.0%} of {found['self_labelled']} left out, all of one score"
        if found["self_labelled"]:
            self.accelerator.print(
                f"{self.title}: candidates' best {found['mean_best']:+.4f}, worst {found['mean_worst']:+.4f} on "
                f"average ({ties})"
            )
        try:
            check_batch(found["pairs"], self.table.training, self.accelerator.num_processes)
        except InputError as error:
            raise InputError(f"round {self.k}: {error} (candidates: {ties}, by {self.candidates.judge})") from None
        settings = {"num": self.candidates.num, "share": self.candidates.share, "judge": self.candidates.judge}
        return settings | found

    def _num_drawn(self, samples: _Samples) -> int:
        """Samples of the opponent, on average over the seeds that choose which prompts get candidates."""
        each = self.candidates.drawn_on_average if self.candidates is not None else self.rounds.num_generated
        return round(samples.part.count(samples.data) * each)

    def _copies(self, id_: str) -> int:
        """Samples that the opponent draws for a real one."""
        if self.candidates is None:
            return self.rounds.num_generated
        return self.candidates.drawn_for(self.rounds.seed, self.k, id_)

    def _draw(self, samples: _Samples, target: Path, k: int, metadata: dict[str, str]) -> int:
        """The samples that member k of the mixture draws; how many this process drew."""
        opponent = self._seat(k)
        seed = self.rounds.seed

        def ask(real: list[Row]) -> list[Row]:
            return [
                row | {"place": place, "k": copy}
                for place, row in enumerate(real[samples.part.places])
                for copy in range(self._copies(row["id"]))
                if member(self.mixture, seed, self.k, row["id"], copy) == k
            ]

        def draw(rows: list[Row], done: Callable[[int], None]) -> list[Row]:
            seeds = [seed_from(seed, self.k, row["id"], row["k"]) for row in rows]
            drawn = self.game.generate(rows, seeds, done) if rows else []
            return [
                found | {"place": row["place"], "k": row["k"], "opponent": opponent}
                for found, row in zip(drawn, rows, strict=True)
            ]

        share = f" by {describe({k: 1.0})}" if len(self.mixture) > 1 else ""
        total = round(self._num_drawn(samples) * self.mixture[k])
        bar = self.table.progress.phase(f"{samples.title}: generate{share}", total)
        return draw_shards(samples.data, target, ask, draw, metadata, self.game.prompt_columns, self.accelerator, bar)

    def _cache(self) -> dict[str, Any]:
        encoded = 0
        for samples in self.sets:
            if self.source == "opponent":
                wanted = {}
                if self.candidates is not None:
                    choices = samples.folder / CHOICES
                    wanted["rows_of"] = lambda path, choices=choices: chosen_samples(path, choices / path.name)
                    wanted["beside"] = choices
                encoded += encode_shards(
                    samples.folder / SAMPLES, samples.folder / ENCODED, self.game, self.accelerator,
                    self.table.progress.phase(f"{samples.title}: encode", self._num_drawn(samples)), **wanted,
                )  # fmt: skip
            if self.game.keeps_scores:
                self._score(samples)
            elif self.game.fixed_draws:
                self._score_draws(samples)
        files = self._hashes(ENCODED) | (self._hashes(SCORES) if self.scores_kept else {})
        return {"worked_on": encoded, "files": files}

    def _score_draws(self, samples: _Samples) -> None:
        """The opponent's scores of all pairs at their fixed draws."""
        opponent = self._seat(max(self.anchors))
        total = samples.part.count(samples.data)
        bar = self.table.progress.phase(f"{samples.title}: score {self.game.fixed_draws} draws of each pair", total)
        score_draws(
            samples.data / "samples", samples.folder / SCORES, self._pairs(samples, scored=False), samples.part,
            self.game, self.rounds.seed, self.k, self.table.training.train_batch_size, opponent, self.accelerator, bar,
        )  # fmt: skip

    def _score(self, samples: _Samples) -> None:
        """The opponent's scores of both sides, which do not change while the player is trained."""
        sides = {"real": (samples.data / ENCODED, samples.part, "")}
        if self.source == "opponent":
            sides["generated"] = (samples.folder / ENCODED, Part(), "")
        elif self.source == "data":
            sides["generated"] = (samples.data / ENCODED, samples.part, "loser_")
        single = len(self.anchors) == 1
        for k in self.anchors:
            opponent = self._seat(k)
            for side, (source, part, prefix) in sides.items():
                target = samples.folder / (SCORES if single else f"{SCORED_BY}/{k}") / side
                total = samples.part.count(samples.data) * (self.rounds.num_generated if side == "generated" else 1)
                bar = self.table.progress.phase(f"{samples.title}: score the {side} samples", total)
                score_shards(source, target, self.game, part, prefix, opponent, self.accelerator, bar)
        for side in sides if not single else ():
            by_member = {samples.folder / SCORED_BY / str(k) / side: weight for k, weight in self.anchors.items()}
            mixture = _hash_of(self.record["opponent"]["anchors"])
            mix_scores(by_member, samples.folder / SCORES / side, mixture, self.accelerator)

    def _probe(self) -> None:
        """Let the probe look at the samples, once in a round."""
        probe = self.table.probe
        if probe is None or probe.samples == 0 or self.source != "opponent":
            return
        if "shortcut" not in self.record:
            self._take("CACHED", partial(self._look, probe), "probed")
        found = self.record["shortcut"]
        for line in found["lines"]:
            self.accelerator.print(f"{self.title}, before training: {line}")
        if probe.stops and found["state"] == "warn":
            raise InputError(f"{self.title} is not trained (--on_shortcut stop): {found['lines'][0]}")

    def _look(self, probe: Probe) -> dict[str, Any]:
        """What the probe says, by the main process."""
        real, found = [], [None]
        if self.accelerator.is_main_process:
            samples = self.sets[0]
            real, generated = some_pairs(samples.data, samples.folder / SAMPLES, samples.part, probe.samples)
            found = [probe(real, generated)]
        return {"shortcut": broadcast_object_list(found)[0], "worked_on": len(real)}

    def _train(self) -> dict[str, Any]:
        game, settings = self.game, self.table.training
        average = self._average_so_far()
        before = None if self.scores_kept else self._seat(max(self.anchors))
        self.table.seat_player(self.table.folder(self.parent))
        loss, pairs = self._loss(), self._pairs(self.sets[0])
        plan = self._plan(loss, len(pairs.ids))
        bar = self.table.progress.phase(f"{self.title}: train", plan.steps)
        self.table.before_training()
        if game.fixed_draws:
            self._release_opponent(plan.steps, len(pairs.ids))
        training = train(
            game,
            pairs,
            plan,
            # Without a generated side there is nothing to tell apart
            replace(settings, health=replace(settings.health, saturation="ignore"))
            if self.source == "none"
            else settings,
            self.accelerator,
            self.directory,
            lambda done, total, text: bar(done, text),
            average,
        )
        self._check_opponent(before, training)
        self._tell_training(training)
        saved = game.save(self.directory)
        self.accelerator.wait_for_everyone()
        self.table.after_training(self.directory)
        gap = self._gap(loss)
        if average is not None:
            saved = [*saved, *self._save_average(average)]
        pairs_here = (training["steps"] - training["resumed_from"]) * (
            settings.train_batch_size * settings.gradient_accumulation_steps
        )
        files = file_hashes(saved, self.table.output_dir)
        return {"training": training, "worked_on": pairs_here, "files": files} | gap

    def _loss(self) -> Loss:
        """The round's objective with its settings."""
        settings = {
            "beta": of_round(self.rounds.beta, self.k),
            "mu": of_round(self.rounds.mu, self.k) or float(self.rounds.num_generated),
        }
        return bind(self.objective, **settings | (self.rounds.objective_options or {}))

    def _plan(self, loss: Loss, pairs: int) -> RoundPlan:
        """What the training loop needs to know, with so many pairs to train on."""
        beta = of_round(self.rounds.beta, self.k)
        steps, warmup_steps = steps_of_round(self.table.training, self.k, pairs, self.accelerator.num_processes)
        return RoundPlan(
            name=f"{title_of(self.objective)}/round-{self.k}",
            round_=self.k,
            seed=self.rounds.seed,
            steps=steps,
            learning_rate=of_round(self.table.training.learning_rate, self.k),
            warmup_steps=warmup_steps,
            beta=beta,
            loss=with_anchor(loss, self.rounds.sft_weight * beta),
            anchored_at_player=self.anchors == {self.parent: 1.0}
            and (self.rounds.opponent != "ema" or self.parent == 0 or self.rounds.anchor == "base"),
        )

    def _release_opponent(self, steps: int, pairs: int) -> None:
        """With fixed draws it has said all that it is asked; whether that was worth it is printed."""
        self.game.release_opponent()
        self.table.opponent_has_moved()
        visits = steps * check_batch(pairs, self.table.training, self.accelerator.num_processes)
        visits /= pairs * self.game.fixed_draws
        gain = "" if visits >= 2 else ": fewer than 2 saves memory, not time"
        self.accelerator.print(f"{self.title}: {visits:.2g} visits of each of the pairs' fixed draws{gain}")

    def _check_opponent(self, before: str | None, training: dict[str, Any]) -> None:
        """It is what it was, whose hash was `before` (None = its scores were kept), or what it was refreshed to."""
        if before is None:
            verify_hashes(self.record["files"], self.table.output_dir)  # the kept scores are among them
            return
        if training["anchors"]:
            self.table.opponent_has_moved()
            before = training["anchors"][-1]["hash"]
        assert self.game.opponent_hash() == before, f"round {self.k}: the opponent changed while the player was trained"

    def _tell_training(self, training: dict[str, Any]) -> None:
        ended, how = training["ended_by"], ""
        if ended is not None:
            kept = f", the player as it was at step {ended['kept_step']}" if ended["action"] == "roll_back" else ""
            how = f", ended by {ended['rule']}{kept}"
        self.accelerator.print(
            f"{self.title}: {training['steps']} steps{how}; over the last ones r_real {training['r_real']:+.2e}, "
            f"r_generated {training['r_generated']:+.2e}, accuracy {training['implicit_accuracy']:.2f}"
        )

    def _average_so_far(self) -> Average | None:
        """For the opponent ema: the average as the opponent of this round is it."""
        if self.rounds.opponent != "ema":
            return None
        self.table.seat_opponent(self.parent)
        folder = self.table.folder(self.parent)
        self.table.seat_player(folder / EMA if self.parent else folder)
        return Average(trained_parameters(self.game), self.rounds.opponent_ema_decay)

    def _save_average(self, average: Average) -> list[Path]:
        """The average after the round, as the next opponent; the player is put back."""
        average.copy_to(trained_parameters(self.game))
        saved = self.game.save(self.directory / EMA)
        self.accelerator.wait_for_everyone()
        self.table.after_training(self.directory / EMA)
        self.table.seat_player(self.directory)
        return saved

    def _gap(self, loss: Loss) -> dict[str, Any]:
        """How well the player tells held-out samples apart."""
        if len(self.sets) == 1:
            return {}
        gap = held_out_gap(
            self.game, self._pairs(self.sets[1]), loss, self.table.training.train_batch_size, self.rounds.seed,
            self.k, self.accelerator,
        )  # fmt: skip
        self.accelerator.print(
            f"{self.title}: held-out gap {gap_text(gap)} nats over {gap['num_samples']} samples"
            + ("" if is_above_zero(gap) else "; nothing is learnt that carries over")
        )
        return {"held_out_gap": gap}

    def _pairs(self, samples: _Samples, scored: bool = True) -> Pairs:
        """
        Args:
            scored: with the opponent's scores, where they are kept.
        """

        def scores(side: str) -> Path | None:
            return samples.folder / SCORES / side if self.scores_kept and scored else None

        kept = samples.folder / KEPT
        generated = {
            "opponent": Side(samples.folder / ENCODED, scores("generated"), kept=kept if kept.is_dir() else None),
            "data": Side(samples.data / ENCODED, scores("generated"), "loser_"),
            "none": None,
        }[self.source]
        if self.source == "opponent":
            self._check_samples(samples.folder / SAMPLES)
        real = Side(samples.data / ENCODED, scores("real"))
        choices = samples.folder / CHOICES if self.candidates is not None else None
        return open_pairs(samples.data, real, generated, samples.part, self.rounds.num_generated, choices,
                          self.game.fixed_draws, self.game.kept_part)  # fmt: skip

    def _check_samples(self, folder: Path) -> None:
        """A sample is trained on only when one of this round's opponents drew it."""
        known = {found["hash"] for found in self.record["opponent"]["members"]}
        for path in shards(folder, ".parquet"):
            for row in read_rows(path, columns=["id", "opponent"]) if rows_in(path) else []:
                if row["opponent"] not in known:
                    raise InputError(
                        f"{path}: sample {row['id']} was drawn by another opponent ({str(row['opponent'])[:12]}) than "
                        f"round {self.k}'s ({', '.join(sorted(digest[:12] for digest in known))}): "
                        f"{replay(self.directory)}"
                    )

    def _evaluate(self) -> dict[str, Any]:
        gap = self.record.get("held_out_gap")
        learnt = self.rounds.stop_when_learnt and gap is not None and not is_above_zero(gap)
        reason = None
        if learnt:
            reason = f"its held-out gap {gap_text(gap)} is not above 0"
        ended = self.record["training"]["ended_by"]
        if ended is not None and ended["action"] == "roll_back" and ended["kept_step"] == 0:
            reason = f"it was rolled back to its start, {ended['rule']}: {ended['sentence']}"
        if self.table.evaluate is None:
            return {"metrics": {}, "rejected_because": reason, "learnt": learnt}
        self.table.seat_player(self.directory)
        judged = self.table.evaluate(self.k, self.directory / EVALUATION, self.parent)
        self.accelerator.wait_for_everyone()
        # Its files are not hashed here: they say themselves what they belong to, and are made anew when that changes
        return {
            "metrics": judged.metrics,
            "rejected_because": reason or (None if judged.promote else judged.reason),
            "learnt": learnt,
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
                target = self.table.output_dir / path.name
                shutil.copytree(path, part_of(target), dirs_exist_ok=True)
                commit(target)
        return {"decision": "promoted"}

    def mend_copy(self) -> None:
        """Copy anew what was damaged or removed of this round's player where users load it, beside the rounds."""
        if self.accelerator.is_main_process:
            saved, below = self._saved_names(), self.table.output_dir
            for name, digest in self.record["files"].items():
                source, target = below / name, below.joinpath(*Path(name).parts[1:])
                if Path(name).parts[1] not in saved or is_whole(target, digest):
                    continue
                print(f"{target} is not what round {self.k} saved (damaged, or removed): it is copied anew")
                write_file(target, lambda part, source=source: shutil.copyfile(source, part))
        self.accelerator.wait_for_everyone()

    def _saved_names(self) -> list[str]:
        """Top-level names in the round's folder that `game.save` wrote."""
        prefix = f"{self.directory.name}/"
        names = {name.removeprefix(prefix).split("/")[0] for name in self.record["files"] if name.startswith(prefix)}
        return sorted(names - {SAMPLES, CHOICES, ENCODED, KEPT, SCORES, HELD_OUT, EMA, EVALUATION})

    def _hashes(self, name: str) -> dict[str, str]:
        """Of all files in the folders of this name."""
        self.accelerator.wait_for_everyone()
        folders = [samples.folder / name for samples in self.sets]
        return file_hashes([folder for folder in folders if folder.is_dir()], self.table.output_dir)


def _made_in(name: str) -> str:
    """The state that makes the file of a name in a record, such as round-1/held_out/samples/00000-of-00001.parquet."""
    inside = Path(name).parts[1:]
    folder = inside[1] if inside[0] == HELD_OUT else inside[0]
    made_in = dict.fromkeys((SAMPLES, KEPT, CHOICES), "GENERATED") | dict.fromkeys((ENCODED, SCORES), "CACHED")
    return made_in.get(folder, "TRAINED")


def _hash_of(members: list[dict[str, Any]]) -> str:
    """One hash for the opponent: its own, or one over the hashes and weights of a mixture's members."""
    if len(members) == 1:
        return members[0]["hash"]
    return hashlib.sha256(json.dumps(members, sort_keys=True).encode()).hexdigest()
