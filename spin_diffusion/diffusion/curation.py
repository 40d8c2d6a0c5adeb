"""A scorer of images as the judge: it chooses the real images that are played with (curation), and the best and the
worst of the opponent's own (`samples.candidates`).

Curation comes before anything else is done with the images.
The data set is read twice, and nothing but one number for each example stays in memory: first every example is scored
as it would be stored, then the chosen ones are taken. Scores lie in OUTPUT_DIR/curation shard by shard until the chosen
images are stored, so a killed run goes on where it was, and data/curation.parquet says what was chosen.
"""

import gc
import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, UInt64

from spin_diffusion.data.rows import Example
from spin_diffusion.data.settings import CurationSettings
from spin_diffusion.diffusion.settings import CandidateSettings
from spin_diffusion.evaluation.scorers import LoadedScorer, about, load_scorer, parse_spec
from spin_diffusion.evaluation.scorers import __name__ as SCORERS
from spin_diffusion.evaluation.scoring import BATCH, check_specs, score_images
from spin_diffusion.evaluation.specs import part_key
from spin_diffusion.samples.candidates import Candidates, Judge
from spin_diffusion.samples.sample import Row
from spin_diffusion.store.files import (
    Made,
    Piece,
    build,
    build_pieces,
    is_built,
    read_json,
    read_rows,
    rows_metadata,
)
from spin_diffusion.store.input_error import InputError
from spin_diffusion.store.keys import KEY, key_of
from spin_diffusion.store.pictures import open_picture
from spin_diffusion.store.progress import Progress
from spin_diffusion.store.run_dir import remove_files, write_file
from spin_diffusion.store.sharing import shared_out

IdOf = Callable[[Example], str]
"""The id of an example's stored row, 16 hexadecimal digits, without storing it."""
Stored = Callable[[Iterable[Example]], Iterator[Row]]
"""Examples as the rows that are stored of them."""


def check_judges(curation: CurationSettings, candidates: CandidateSettings, select_by: str = "gap") -> None:
    """InputError when there is no such scorer, or a higher score is not better; no weights are read."""
    if select_by not in ("gap", "fd"):
        _check_judge("--select_by", select_by, "no step is its best")
    if curation.scorer is not None:
        _check_judge("--curation scorer", curation.scorer, "it cannot choose")
    if candidates.number and candidates.scorer is not None:
        _check_judge("--candidates scorer", candidates.scorer, "it has no best")


def _check_judge(flag: str, spec: str, why: str) -> None:
    try:
        check_specs([spec])
        role = about(spec).role
    except InputError as error:
        raise InputError(f"{flag} {spec}: {error}") from None
    if role == "drift":
        raise InputError(
            f"{flag} {spec}: neither high nor low is good in a score of drift, so {why}: give another scorer, "
            "pickscore say, or a .py file of your own"
        )


def scorer_by_content(spec: str) -> str:
    """A scorer's spec with the hash of what is behind it: code and weights may change between two starts of a run,
    their names do not."""
    return f"{spec} (SHA-256 {part_key(SCORERS, spec)[:16]})"


def candidates_of(settings: CandidateSettings, device: str) -> Candidates | None:
    """What the rounds need to know; None = no candidates are asked for.

    Args:
        device: where the scorer runs, such as "cpu" or "cuda:0".
    """
    spec = settings.scorer
    if not settings.number or spec is None:
        return None

    judge = scorer_by_content(spec)
    return Candidates(settings.number, settings.share, judge, lambda: scorer_as_judge(spec, device))


def scorer_as_judge(spec: str, device: str) -> Judge:
    """A scorer of images as a judge of stored samples; its weights are read now."""
    return partial(score_rows, load_scorer(spec, device))


def score_rows(scorer: LoadedScorer, rows: list[Row]) -> list[float]:
    """The score of each stored image for its prompt."""
    return score_images(scorer, (open_picture(row["image"]) for row in rows), [row["prompt"] for row in rows])


def content_settings(settings: CurationSettings) -> dict[str, object]:
    """What decides which images are chosen: the settings, with the hash of what is behind the scorer's name."""
    spec = settings.scorer
    return asdict(settings) | {"scorer": scorer_by_content(spec) if spec is not None else None}


class Chosen(TypedDict):
    """What was chosen, for the report."""

    scorer: str | None
    checkpoint: dict[str, str]
    scored: int
    kept: int
    left_out: dict[str, int]
    """Flag of a rule, with its value -> how many it left out."""
    ranked: int
    """How many were left for the top to choose from."""
    lowest: float
    highest: float


# Which are chosen


@dataclass(frozen=True, eq=False)
class Choice:
    """What the rules make of the scores.

    Attributes:
        chosen: for each example whether it is kept.
        left_out: flag of the rule, with its value -> how many it left out.
        ranked: how many were left for the top to choose from.
    """

    chosen: Bool[np.ndarray, " examples"]
    left_out: dict[str, int]
    ranked: int


def choose(
    scores: Float[np.ndarray, " examples"],
    ids: UInt64[np.ndarray, " examples"],
    prompts: UInt64[np.ndarray, " examples"],
    settings: CurationSettings,
    one_per_prompt: bool = False,
) -> Choice:
    """The examples to keep: the best of each prompt, of these those above the threshold, of these the top.

    Args:
        scores: higher = better; of equal ones the lower id counts as better.
        prompts: equal where the prompts are equal.
    """
    best_first = np.lexsort((ids, -scores))
    steps = {"": best_first}  # by rule, what it leaves
    if one_per_prompt:
        _, first = np.unique(prompts[best_first], return_index=True)
        steps["--one_image_per_prompt"] = best_first = best_first[np.sort(first)]
    if settings.threshold is not None:
        # Scorers return fp32: a score of 0.7 is below the 0.7 of fp64
        above = scores[best_first].astype(np.float32) >= np.float32(settings.threshold)
        steps[f"--curation threshold {settings.threshold:g}"] = best_first = best_first[above]
    ranked = len(best_first)
    if settings.top is not None:
        steps[f"--curation top {settings.top}"] = best_first = best_first[: settings.top]
    left_out = {rule: len(before) - len(after) for (_, before), (rule, after) in pairwise(steps.items())}
    chosen = np.zeros(len(scores), dtype=np.bool_)
    chosen[best_first] = True
    return Choice(chosen, left_out, ranked)


# From the data set to the chosen examples


COMPLETE = "complete.json"
"""Beside the files of scores, once there are all of them."""


class _Complete(TypedDict):
    """What complete.json holds: how many images have scores, and by which weights."""

    scored: int
    checkpoint: dict[str, str]


@dataclass(eq=False)
class Curation:
    """The curation of one run's real images. All processes may score; the main one alone chooses.

    Attributes:
        settings: the rules; their scorer is given.
        directory: of the scores, until `forget`.
        table: where is written what was chosen.
        decides: whatever else decides the scores and the order of the examples.
        read: the data set from its beginning, the same examples in the same order each time.
        id_of, stored: how an example becomes a row.
        rows_per_shard: examples per file of scores; what a killed process loses at most.
        device: where the scorer runs.
        one_per_prompt: keep the best of each prompt alone.
    """

    settings: CurationSettings
    directory: Path
    table: Path
    decides: dict[str, object]
    read: Callable[[], Iterator[Example]]
    id_of: IdOf
    stored: Stored
    rows_per_shard: int
    device: str
    one_per_prompt: bool = False
    progress: Progress = field(default_factory=Progress)
    summary: Chosen | None = None
    """What was chosen, once `take` has been called."""

    def take(self, again: Callable[[], Iterator[Example]]) -> Iterator[Example]:
        """The chosen examples in the order of the data set; what is not scored yet is scored before the first is asked
        for. Called on the main process alone.

        Args:
            again: reads the data set a second time; its examples are taken one by one.

        Raises:
            InputError: a scorer that cannot run, a threshold that leaves nothing, or a data set that changes while it
                is read.
        """
        self.score(None)
        scores, ids, prompts = self._scored()
        choice = choose(scores, ids, prompts, self.settings, self.one_per_prompt)
        if not choice.chosen.any():
            raise InputError(self._nothing_left(scores, prompts))
        self.summary = self._summary(scores, choice)
        self._write_table(choice.chosen)
        return self._chosen(again(), ids, choice.chosen)

    def forget(self) -> None:
        """Remove the scores that a killed run would have gone on with; the table has them too."""
        (self.directory / COMPLETE).unlink(missing_ok=True)  # first: what a kill leaves does not seem to be whole
        remove_files(self.directory, _is_scores)

    # Scores

    def score(self, accelerator: Accelerator | None) -> None:
        """Score what is not scored yet. Each process reads the whole data set and scores the files that fall to it; a
        file is scored whole by one process, so the scores do not depend on how many there are.

        Args:
            accelerator: all of its processes call this; None = this process is alone.

        Raises:
            InputError: a scorer that cannot run, or a data set that is not the one that was begun with.
        """
        spec = str(self.settings.scorer)
        decides = self.decides | {"curation_scorer": content_settings(self.settings)["scorer"]}
        complete = self.directory / COMPLETE
        is_done = is_built(complete, key_of(**decides))
        wait = accelerator.wait_for_everyone if accelerator is not None else lambda: None
        wait()  # all have looked before one of them changes something
        if is_done:
            return
        try:
            scorer = load_scorer(spec, self.device)
        except InputError as error:
            raise InputError(f"--curation scorer {spec}: {error}") from None
        checkpoint = dict(scorer.checkpoint)
        key = key_of(decides=decides, checkpoint=checkpoint)
        numbers = range(2**62)  # how many files there will be is known at the end of the data set
        pieces = self._pieces(scorer, key, shared_out(numbers, accelerator) if accelerator is not None else numbers)
        bar = self.progress.phase(f"score the real samples by {scorer.name}", 0)
        try:
            build_pieces(pieces, bar, accelerator.num_processes if accelerator is not None else 1)
        except InputError as error:
            blamed = f"--curation scorer {spec}: " if str(error).startswith("scorer ") else ""
            raise InputError(f"{blamed}{error}") from None
        wait()
        if accelerator is None or accelerator.is_main_process:
            build(complete, key_of(**decides), lambda: Made({"scored": self._count(key), "checkpoint": checkpoint}))
        wait()
        # The run needs the memory for itself
        del scorer, pieces
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _pieces(self, scorer: LoadedScorer, key: str, numbers: Iterable[int]) -> Iterator[Piece]:
        """The files of scores of these numbers, as long as there are examples for them."""
        examples, at = self.read(), 0
        for number in numbers:
            for _ in islice(examples, (number - at) * self.rows_per_shard):  # another process's
                pass
            at = number + 1
            first = list(islice(examples, 1))
            if not first:
                return
            mine = chain(first, islice(examples, self.rows_per_shard - 1))
            yield self._piece(number, key, scorer, mine)
            for _ in mine:  # of a file that is there already
                pass

    def _piece(self, number: int, key: str, scorer: LoadedScorer, examples: Iterator[Example]) -> Piece:
        path = self.directory / f"{number:05d}.parquet"

        def make(tell: Callable[[int], None]) -> Made:
            rows: list[Row] = []
            while batch := list(self.stored(islice(examples, BATCH))):
                scores = score_rows(scorer, batch)
                rows += [
                    {"id": row["id"], "prompt": row["prompt"], "score": score}
                    for row, score in zip(batch, scores, strict=True)
                ]
                tell(len(rows))
            return Made(rows)

        return Piece(path, key, self.rows_per_shard, make)

    def _count(self, key: str) -> int:
        """How many examples have scores of this key."""
        written = [rows_metadata(path) for path in self.directory.iterdir() if _is_scores(path.name)]
        return sum(int(said["rows"]) for said in written if said.get(KEY) == key)

    def _scored(
        self,
    ) -> tuple[Float[np.ndarray, " examples"], UInt64[np.ndarray, " examples"], UInt64[np.ndarray, " examples"]]:
        """Score, id and the prompt's hash of every example, in the order of the data set: 24 bytes for each."""
        scores, ids, prompts = array("d"), array("Q"), array("Q")
        for path in self._shards():
            for row in read_rows(path, remedy=self._score_again()):
                scores.append(row["score"])
                ids.append(int(row["id"], 16))
                digest = hashlib.blake2b(row["prompt"].encode("utf-8", "surrogatepass"), digest_size=8).digest()
                prompts.append(int.from_bytes(digest, "big"))
        return np.array(scores, np.float64), np.array(ids, np.uint64), np.array(prompts, np.uint64)

    def _shards(self) -> list[Path]:
        count = self._complete()["scored"]
        return [self.directory / f"{number:05d}.parquet" for number in range(-(-count // self.rows_per_shard))]

    def _complete(self) -> _Complete:
        return read_json(self.directory / COMPLETE, _Complete, self._score_again())

    # What was chosen

    def _chosen(
        self, examples: Iterator[Example], ids: UInt64[np.ndarray, " examples"], chosen: Bool[np.ndarray, " examples"]
    ) -> Iterator[Example]:
        count = 0
        for example in examples:
            if count == len(ids) or int(self.id_of(example), 16) != ids[count]:
                raise InputError(self._has_changed())
            count += 1
            if chosen[count - 1]:
                yield example
        if count != len(ids):
            raise InputError(self._has_changed())

    def _write_table(self, chosen: Bool[np.ndarray, " examples"]) -> None:
        schema = pa.schema(
            [("id", pa.string()), ("prompt", pa.string()), ("score", pa.float64()), ("chosen", pa.bool_())]
        )

        def write(part: Path) -> None:
            with pq.ParquetWriter(part, schema, write_page_checksum=True) as writer:
                start = 0
                for path in self._shards():
                    rows = read_rows(path, remedy=self._score_again())
                    kept = chosen[start : start + len(rows)].tolist()
                    said = [row | {"chosen": is_kept} for row, is_kept in zip(rows, kept, strict=True)]
                    writer.write_table(pa.Table.from_pylist(said, schema))
                    start += len(rows)

        write_file(self.table, write)

    def _summary(self, scores: Float[np.ndarray, " examples"], choice: Choice) -> Chosen:
        kept = scores[choice.chosen]
        return {
            "scorer": self.settings.scorer,
            "checkpoint": self._complete()["checkpoint"],
            "scored": len(scores),
            "kept": len(kept),
            "left_out": choice.left_out,
            "ranked": choice.ranked,
            "lowest": float(kept.min()),
            "highest": float(kept.max()),
        }

    def _nothing_left(self, scores: Float[np.ndarray, " examples"], prompts: UInt64[np.ndarray, " examples"]) -> str:
        low, middle, high = np.quantile(scores, [0, 0.5, 1])
        of = f"the best of {len(np.unique(prompts))} prompts" if self.one_per_prompt else "the real images"
        return (
            f"--curation threshold {self.settings.threshold:g} leaves none of {of}: "
            f"{_name(self.settings.scorer)} scores {len(scores)} images from {low:.4g} to {high:.4g}, the "
            f"median is {middle:.4g}; give a lower one, their scores are kept"
        )

    def _score_again(self) -> str:
        return f"delete {self.directory} and run the same command again, which scores the data set anew"

    def _has_changed(self) -> str:
        return (
            f"the data set is not the one that was scored by --curation scorer {self.settings.scorer}: its "
            f"examples or their order have changed; delete {self.directory} to score it again"
        )


def curation_line(summary: Chosen) -> str:
    """ "curated by pickscore: 500 of 1600 kept (scores 0.213 to 0.244)"."""
    return (
        f"curated by {_name(summary['scorer'])}: {summary['kept']} of {summary['scored']} kept (scores "
        f"{summary['lowest']:.4g} to {summary['highest']:.4g})"
    )


def curation_lines(summary: Chosen, settings: CurationSettings) -> list[str]:
    """What was chosen, and which rule left out how many."""
    lines = [curation_line(summary)]
    lines += [f"  left out by {rule}: {count}" for rule, count in summary["left_out"].items() if count]
    if settings.top is not None and summary["ranked"] < settings.top:
        lines.append(f"  --curation top {settings.top} is more than the {summary['ranked']} there are")
    name = _name(summary["scorer"])
    return [*lines, f"  {name} chose what is learnt, so a rise of its score alone is no gain: judge by other scorers"]


def _is_scores(name: str) -> bool:
    """Whether a file has the scores of a shard."""
    return re.fullmatch(r"\d{5,}\.parquet", name) is not None


def _name(spec: str | None) -> str:
    return parse_spec(str(spec))[0]
