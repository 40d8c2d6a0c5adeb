"""What became of every row that was read: used, or left out for a counted reason."""

from dataclasses import dataclass, field
from enum import StrEnum

from spin_diffusion.store.text import printable


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
    first_bad: LeftOutRow | None = None
    """The first row that was left out for one of BAD_REASONS."""

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
        row = LeftOutRow(where, detail)
        self.left_out[reason] += 1
        if len(self.kept_rows[reason]) < MAX_KEPT_ROWS:
            self.kept_rows[reason].append(row)
        if self.first_bad is None and reason in BAD_REASONS:
            self.first_bad = row

    def reasons(self) -> str:
        """The reasons that occurred with their counts, on one line: "3 tie, 1 corrupt image"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)

    def lines(self) -> list[str]:
        """Summary for a person: one line of totals, then one for each reason that occurred, with its first row."""
        lines = [f"read {self.read} rows: used {self.used}, left out {sum(self.left_out.values())}"]
        for reason, count in self.left_out.items():
            if count:
                lines.append(f"  {reason}: {count} (first: {self.kept_rows[reason][0]})")
        return lines

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
