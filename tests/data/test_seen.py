"""What is kept of examples to recognise them again."""

from spin_diffusion.data.reading import Seen, short_hash


def test_hashes_are_known_before_and_after_they_are_settled():
    seen, known = Seen(most_fresh=4), set()
    for number in [*range(11), 3, 9, *range(8, 14)]:
        digest = short_hash(str(number).encode())
        assert (digest in seen) == (number in known)
        seen.add(digest)
        known.add(number)
    assert len(seen.settled) + len(seen.fresh - set(seen.settled.tolist())) == 14
    assert short_hash(b"another") not in seen
    highest = b"\xff" * 16
    assert highest not in seen
    for number in range(4):
        seen.add(bytes([255 - number]) * 16)
    assert highest in seen and seen.settled.dtype == "uint64"
