"""Rows of a data set: what sources hand on, what becomes of each row, and the one loop that takes those of use.

The loop is the same for images and text: a row becomes an example, or is left out for a counted reason.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import numpy as np

from spin_diffusion.store.input_error import InputError, broken_character, printable


class Bad(StrEnum):
    """Why a row is left out whose data is damaged: these count against max_bad_share."""

    CORRUPT_IMAGE = "corrupt image"
    EMPTY_CAPTION = "empty caption"
    MISSING_IMAGE_FILE = "missing image file"
    BROKEN_TEXT = "broken characters in the text"
    DANGLING_LINK = "link to nothing"
    UNREADABLE_FOLDER = "folder that cannot be read"
    MALFORMED = "malformed line"
    OTHER_LAYOUT = "another layout"
    WRONG_TYPE = "wrong type"
    NO_USER_TURN = "no user turn"
    NO_ASSISTANT_TURN = "no assistant turn"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    ANSWER_IS_PROMPT = "answer equal to the prompt"
    TWO_PROMPTS = "pair of two prompts"
    REFUSED_BY_TEMPLATE = "refused by the chat template"
    CHANGED_BY_TEMPLATE = "changed by the chat template"


class Expected(StrEnum):
    """Why a row is left out that is what it is meant to be, but not for training: never an error."""

    TIE = "tie"
    NO_LABEL = "no label"
    FILTERED = "filtered"
    REPEATED_PROMPT = "repeated prompt"
    REPEATED_EXAMPLE = "repeated example"
    NOT_IN_METADATA = "not in metadata"
    READ_ALREADY = "link to a folder that is read already"
    HELD_OUT = "held out"
    PROMPT_TOO_LONG = "prompt longer than --max_length"
    SPECIAL_TOKEN = "special token in the text"


BAD_REASONS = tuple(reason.value for reason in Bad)
REASONS = BAD_REASONS + tuple(reason.value for reason in Expected)
MAX_KEPT_ROWS = 100
"""Rows whose place and detail are kept, per reason; more are only counted."""
MAX_NAMED_ROWS = 20
"""Bad rows that are named to a person, per reason; more are only counted there."""
HOPELESS_BAD_ROWS = 100
HOPELESS_BAD_SHARE = 0.5
"""Above both, reading on is a waste of time: it stops at once."""


class LeftOut(Exception):
    """This row is not used. It never leaves the reading: it becomes a count in the report."""

    def __init__(self, reason: Bad | Expected, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason: str = reason.value
        self.detail = printable(detail)


@dataclass(frozen=True)
class LeftOutRow:
    """Where a row was and why it was not used."""

    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}" if self.detail else self.where


@dataclass
class ReadReport:
    """Counts of one reading, filled while the examples are taken: read = used + everything left out."""

    read: int = 0
    used: int = 0
    left_out: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    """Reason -> rows."""
    kept_rows: dict[str, list[LeftOutRow]] = field(default_factory=lambda: {reason: [] for reason in REASONS})
    """Reason -> its first MAX_KEPT_ROWS rows."""

    @property
    def bad(self) -> int:
        """Rows left out for one of BAD_REASONS."""
        return sum(self.left_out[reason] for reason in BAD_REASONS)

    @property
    def bad_share(self) -> float:
        """Bad rows over rows read, 0 to 1."""
        return self.bad / self.read if self.read else 0.0

    def leave_out(self, where: str, reason: str, detail: str) -> None:
        """Count one row that is not used."""
        self.left_out[reason] += 1
        if len(self.kept_rows[reason]) < MAX_KEPT_ROWS:
            self.kept_rows[reason].append(LeftOutRow(where, detail))

    def reasons(self) -> str:
        """The reasons that occurred with their counts, on one line: "3 tie, 1 corrupt image"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)

    def lines(self) -> list[str]:
        """Summary for a person: a line of totals, then one for each reason that occurred, with its first row; of a
        reason that is somebody's to repair with all rows, up to MAX_NAMED_ROWS."""
        lines = [f"read {self.read} rows: used {self.used}, left out {sum(self.left_out.values())}"]
        for reason, count in self.left_out.items():
            if count and reason in BAD_REASONS:
                lines += [f"  {reason}: {count}", *(f"    {row}" for row in self.named(reason))]
            elif count:
                lines.append(f"  {reason}: {count} (first: {self.kept_rows[reason][0]})")
        return lines

    def named(self, reason: str) -> list[str]:
        """The first MAX_NAMED_ROWS rows of a reason for a person, and how many more there are."""
        more = self.left_out[reason] - MAX_NAMED_ROWS
        named = [str(row) for row in self.kept_rows[reason][:MAX_NAMED_ROWS]]
        return named + ([f"and {more:,} more"] if more > 0 else [])

    def as_dict(self) -> dict[str, object]:
        """The same as plain values that json can write, with the reasons that occurred."""
        return {
            "read": self.read,
            "used": self.used,
            "left_out": {reason: count for reason, count in self.left_out.items() if count},
            "rows": {
                reason: [{"where": row.where, "detail": row.detail} for row in rows]
                for reason, rows in self.kept_rows.items()
                if rows
            },
        }


Values = dict[str, object]
"""The values of a row by its columns."""
Message = dict[str, str]
"""One turn: {"role": "system", "user", "assistant" or "tool", "content": its text}."""
T = TypeVar("T")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    where: str
    """For messages, printable: "train-00001.parquet row 17" (rows count from 0), "photos/cat.png"."""
    values: Mapping[str, object]
    """Column -> value, at least for the columns that were asked for and that the row has."""
    read_file: Callable[[str], bytes]
    """Bytes of an image given by path. Raises LeftOut if it is not there, InputError if it may not be read."""
    left_out: LeftOut | None = None
    """Set when the source itself found that the row cannot be used."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", printable(self.where))

    @classmethod
    def read(cls, where: str, values: Values | LeftOut, read_file: Callable[[str], bytes]) -> "Row":
        """The row with these values, or the row that is left out because they cannot be had."""
        return cls(where, {}, read_file, values) if isinstance(values, LeftOut) else cls(where, values, read_file)


@dataclass(frozen=True)
class Source:
    """A data set as rows, in its own order."""

    name: str
    """For messages: what the user typed."""
    columns: tuple[str, ...]
    """Every column that can be asked for."""
    rows: Callable[[Sequence[str]], Iterator[Row]]
    """The rows with the values of these columns; images of other columns are not read."""


def require_column(source: Source, column: str, flag: str) -> str:
    """Return `column` if the source has it. Raises InputError that names the columns there are and the nearest."""
    if column not in source.columns:
        raise InputError(
            f"{source.name} has no column {column!r} ({flag}); {describe_columns(source.columns, [column])}"
        )
    return column


def find_column(source: Source, given: str | None, names: Sequence[str], flag: str) -> str:
    """The column given, else the first of `names` that exists. Raises InputError with the columns there are."""
    if given is not None:
        return require_column(source, given, flag)
    for name in names:
        if name in source.columns:
            return name
    raise InputError(
        f"{source.name} has none of the columns {', '.join(names)}; {describe_columns(source.columns, names)}; "
        f"name the right one with {flag}"
    )


def describe_columns(columns: Sequence[str], wanted: Sequence[str]) -> str:
    """The columns that exist and the one most like any of `wanted`, for an error."""
    if not columns:
        return "it has no columns"
    likeness = {
        column: max(difflib.SequenceMatcher(None, column.lower(), name.lower()).ratio() for name in wanted)
        for column in columns
    }
    nearest = max(columns, key=lambda column: likeness[column])
    return printable(f"its columns are {', '.join(columns)}; the nearest is {nearest!r}")


def whole_text(text: str, what: str) -> str:
    """The text itself. Raises LeftOut if it has broken characters; `what` names it there."""
    if (place := broken_character(text)) is not None:
        raise LeftOut(Bad.BROKEN_TEXT, f"character {place} of {what} is half of one, or its bytes are not UTF-8")
    return text


@dataclass(frozen=True)
class Example:
    """A prompt and the real image for it."""

    prompt: str
    """The caption without white space around it; never empty."""
    image: bytes
    """The real image, encoded as found; it was decoded once to check that it is whole."""
    loser: bytes | None
    """The worse image of a human pair, only if losers were asked for."""
    where: str
    """For messages: "train-00001.parquet row 17", "photos/cat.png"."""


@dataclass(frozen=True)
class TextExample:
    """A prompt and the real answer to it."""

    prompt: str | list[Message]
    """Plain text, or the turns before the answer, of which the last is the user's (or a tool's)."""
    completion: str
    """The real answer as it stands in the data, with its white space; never blank."""
    rejected: str | None
    """The worse answer of a human pair, only if it was asked for."""
    where: str
    """For messages: "train.jsonl line 17", "train-00001.parquet row 17"."""


def fresh(report: ReadReport | None) -> ReadReport:
    """The report that is given, or one more; it counts one reading."""
    report = ReadReport() if report is None else report
    assert report.read == 0, "a report counts one reading"
    return report


def usable(
    source: Source,
    rows: Iterable[tuple[Row, Found]],
    example_of: Callable[[Found], T],
    report: ReadReport,
    max_samples: int | None,
    max_bad_share: float,
) -> Iterator[T]:
    """What `example_of` makes of what was found in the rows of a source, those left out that it raises LeftOut for.

    Args:
        report: filled while the examples are taken. Who takes one may still leave it out there.
    Raises:
        InputError: over 100 rows and more than half are bad; at the end if more than `max_bad_share` are bad or no row
            was usable.
    """
    for row, found in rows:
        report.read += 1
        try:
            if row.left_out is not None:
                raise row.left_out
            example = example_of(found)
        except LeftOut as left_out:
            report.leave_out(row.where, left_out.reason, left_out.detail)
        else:
            report.used += 1
            yield example
        if report.bad > HOPELESS_BAD_ROWS and report.bad_share > max(HOPELESS_BAD_SHARE, max_bad_share):
            raise InputError(f"reading stopped early: {_bad_rows(source, report)}")
        if report.used == max_samples:
            break
    if report.bad and report.bad_share > max_bad_share:
        raise InputError(
            f"{_bad_rows(source, report)}. Repair the data, or allow the share with --max_bad_share "
            f"(now {max_bad_share:g})"
        )
    if not report.used:
        reasons = f": {report.reasons()}" if report.reasons() else ""
        raise InputError(f"{source.name}: read {report.read} rows and none can be used{reasons}")


def _bad_rows(source: Source, report: ReadReport) -> str:
    rows = "; ".join(row for reason in BAD_REASONS for row in report.named(reason))
    bad = f"{report.bad} of {report.read} rows ({report.bad_share:.1%}) are bad"
    return f"{source.name}: {bad} ({report.reasons()}): {rows}"


def short_hash(*parts: bytes) -> bytes:
    """16 bytes of the parts one after the other."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


class Seen:
    """Hashes that were seen before: 8 bytes of each are kept, of which two among a million agree with a probability of
    3e-8. A set of them would take ten times as much memory."""

    def __init__(self, most_fresh: int = 65536) -> None:
        self.most_fresh = most_fresh
        self.fresh: set[int] = set()
        # Sorted, a part for each first byte: what is added to one part alone is never copied as a whole
        self.settled = [np.zeros(0, np.uint64)] * 256

    def __contains__(self, digest: bytes) -> bool:
        number = int.from_bytes(digest[:8], "big")
        part = self.settled[digest[0]]
        place = np.searchsorted(part, np.uint64(number))
        return number in self.fresh or bool(place < len(part) and part[place] == number)

    def add(self, digest: bytes) -> None:
        """It is seen from now on."""
        self.fresh.add(int.from_bytes(digest[:8], "big"))
        if len(self.fresh) >= self.most_fresh:
            fresh = np.sort(np.fromiter(self.fresh, np.uint64, len(self.fresh)))
            ends = np.searchsorted(fresh, np.arange(1, 256, dtype=np.uint64) << np.uint64(56))
            self.settled = [np.union1d(old, new) for old, new in zip(self.settled, np.split(fresh, ends), strict=True)]
            self.fresh = set()
