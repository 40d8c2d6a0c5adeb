"""Words of a text in any writing, and how much of it is said again."""

import re

# Writing without spaces is counted by its characters: Thai, Lao, Burmese, Khmer, kana, Chinese, Hangul
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words in lower case, and every other sign by itself."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of `n` words, in order; none for a text of fewer words."""
    found = words(text)
    return list(zip(*(found[start:] for start in range(n)), strict=False))


def repeated_share(text: str) -> float:
    """Share of the runs of three words that occurred before, 0 to 1; 0 for a text of fewer words."""
    runs = ngrams(text, 3)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
