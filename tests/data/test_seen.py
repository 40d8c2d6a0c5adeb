"""What is kept of examples to recognise them again."""

from spin_diffusion.data.rows import Seen, short_hash


def test_hashes_are_known_before_and_after_they_are_settled():
    seen, known = Seen(most_fresh=4), set()
    for number in [*range(11), 3, 9, *range(8, 14)]:
        digest = short_hash(str(number).encode())
        assert (digest in seen) == (number in known)
        seen.add(digest)
        known.add(number)
    settled = {number for part in seen.settled for number in part.tolist()}
    assert sum(map(len, seen.settled)) == len(settled) and len(settled | seen.fresh) == 14
    assert short_hash(b"another") not in seen
    assert all(part.dtype == "uint64" and (part >> 56 == first).all() for first, part in enumerate(seen.settled))


def test_hashes_at_the_edges_of_a_part_are_known():
    seen = Seen(most_fresh=4)
    edges = [first + rest * 15 for first in (b"\x00", b"\x01", b"\xfe", b"\xff") for rest in (b"\x00", b"\xff")]
    assert not any(digest in seen for digest in edges)
    for digest in edges:
        seen.add(digest)
    assert not seen.fresh and all(digest in seen for digest in edges)
