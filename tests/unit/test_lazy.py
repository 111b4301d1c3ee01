"""Cases that are made when they are taken: no sooner, and anew each time."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from fedseg.imaging.transforms import PreparedCase
from fedseg.learning.lazy import LazyCases


def test_a_case_is_made_when_it_is_taken_and_no_other_is() -> None:
    made: list[int] = []

    def make(number: int) -> PreparedCase:
        made.append(number)
        image = np.full((1, 2, 2, 2), number, np.float32)
        return PreparedCase(image, None, np.eye(4), (1.0, 1.0, 1.0))

    cases = LazyCases([partial(make, number) for number in range(4)])
    later = cases[1:]
    assert (len(cases), len(later), made) == (4, 3, [])
    assert later[-1].image[0, 0, 0, 0] == cases[3].image[0, 0, 0, 0] == 3
    assert made == [3, 3]
    assert [case.image.mean() for case in later] == [1, 2, 3]
    with pytest.raises(IndexError):
        later[3]
