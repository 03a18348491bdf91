"""Functions in the place of methods: only while they are wanted, and never in a copy."""

import copy
import pickle
from typing import Any

from sb3_klip.fast.standing_in import StandIn, is_replaced, standing_in


class Counter:
    """Has a method."""

    def __init__(self) -> None:
        self.number = 1

    def count(self) -> int:
        """The number."""
        return self.number


class Ten(StandIn):
    """Another result, so that it shows who was called."""

    method = "count"

    def __call__(self) -> int:
        return 10 * self.owner.number


def test_it_is_called_while_it_is_wanted() -> None:
    counter = Counter()
    try:
        with standing_in([Ten(counter)]):
            assert counter.count() == 10
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert counter.count() == 1
    assert vars(counter) == {"number": 1}


def test_copies_have_the_method() -> None:
    counter = Counter()
    with standing_in([Ten(counter)]):
        copies = [copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))]
    for twin in copies:
        twin.number = 2
        assert twin.count() == 2
        assert not is_replaced(twin, "count")


def test_what_somebody_puts_in_its_place_stays() -> None:
    counter: Any = Counter()
    with standing_in([Ten(counter)]):
        counter.count = lambda: 5
    assert counter.count() == 5
    assert is_replaced(counter, "count")
    assert not is_replaced(counter, "number_of_nothing")
