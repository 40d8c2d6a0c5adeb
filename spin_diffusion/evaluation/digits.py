"""How many decimals a number is shown with."""

import math


def decimals_of(value: float, digits: int) -> int:
    """Decimals that show so many digits of a positive number; 6 at most, 3 for 0."""
    return 3 if value == 0 else min(6, max(0, digits - 1 - math.floor(math.log10(value))))
