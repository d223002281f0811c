"""What a connection is writing to: what is added for one use of it goes with that use, and with nothing else."""

from __future__ import annotations

import math

from raypg.core.coherence import EVERYTHING
from raypg.core.intents import Intents
from raypg.server.held import Held


def announce(held: Held, intents: Intents, table: str) -> None:
    held.intents[table] = intents.enter((table,))[0]


def is_open(intents: Intents) -> bool:
    return bool(intents.report(math.inf).intents)


def test_what_was_added_for_one_statement_does_not_go_with_that_of_the_next() -> None:
    intents = Intents("w")
    held = Held(intents)
    announce(held, intents, "one")
    assert held.widen(EVERYTHING, (1.0, None))
    held.end()  # the first statement
    announce(held, intents, EVERYTHING)
    held.over(EVERYTHING, (1.0, None))
    assert set(intents.report(math.inf).intents.values()) == {EVERYTHING}
    held.end()
    assert not is_open(intents)


def test_what_was_added_while_a_transaction_began_does_not_go_with_what_it_writes() -> None:
    intents = Intents("w")
    held = Held(intents)
    assert held.widen(EVERYTHING, (1.0, None))  # BEGIN is under way
    assert held.widen(EVERYTHING, (1.0, "lease"))  # once more, when it is given out
    announce(held, intents, EVERYTHING)
    held.over(EVERYTHING, (1.0, None))
    held.over(EVERYTHING, (1.0, "lease"))
    assert is_open(intents)
    held.end()
    assert not is_open(intents)


def test_what_is_added_twice_counts_once() -> None:
    intents = Intents("w")
    held = Held(intents)
    assert held.widen(EVERYTHING, (1.0, None))
    assert not held.widen(EVERYTHING, (1.0, None))
    held.over(EVERYTHING, (2.0, None))
    assert is_open(intents)
    held.over(EVERYTHING, (1.0, None))
    held.over(EVERYTHING, (1.0, None))
    assert not is_open(intents)
