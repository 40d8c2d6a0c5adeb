"""The loop over the rows of a data set, for images and text: those that can be used, and a count of all others."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from spin_diffusion.data.report import LeftOut, ReadReport
from spin_diffusion.data.rows import Row, Source
from spin_diffusion.store.input_error import InputError

HOPELESS_BAD_ROWS = 100
HOPELESS_BAD_SHARE = 0.5
"""Above both, reading on is a waste of time: it stops at once."""

T = TypeVar("T")


def usable(
    source: Source,
    columns: Sequence[str],
    example_of: Callable[[Row], T],
    report: ReadReport,
    max_samples: int | None,
    max_bad_share: float,
) -> Iterator[T]:
    """What `example_of` makes of the rows of a source, those left out that it raises LeftOut for.

    Args:
        report: filled while the examples are taken. Who takes one may still leave it out there.
    Raises:
        InputError: over 100 rows and more than half are bad; at the end if more than `max_bad_share` are bad or no row
            was usable.
    """
    for row in source.rows(columns):
        report.read += 1
        try:
            if row.left_out is not None:
                raise row.left_out
            example = example_of(row)
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
            f"{_bad_rows(source, report)}; repair the data, or allow the share with --max_bad_share "
            f"(now {max_bad_share:g})"
        )
    if not report.used:
        reasons = report.reasons()
        raise InputError(
            f"{source.name}: read {report.read} rows and none can be used" + (f": {reasons}" if reasons else "")
        )


def _bad_rows(source: Source, report: ReadReport) -> str:
    return (
        f"{source.name}: {report.bad} of {report.read} rows ({report.bad_share:.1%}) are bad: {report.reasons()}; "
        f"the first bad row is {report.first_bad}"
    )


def short_hash(*parts: bytes) -> bytes:
    """16 bytes of the parts one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


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
