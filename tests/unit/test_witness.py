"""Whether the server refused a statement, as far as its bytes tell."""

from __future__ import annotations

import random
import struct

import pytest

from raypg.server.witness import Ear


def message(kind: str, body: bytes = b"") -> bytes:
    return kind.encode() + struct.pack("!I", len(body) + 4) + body


ROWS = message("2") + message("D", b"E\0\0\0\x08Z\0\0\0\5I" * 50)  # what looks like messages inside a row is none
DONE = message("C", b"INSERT 0 1\0") + message("Z", b"I")
ERROR = message("E", b"SERROR\0VERROR\0C23503\0Mno f\xc3\xbcr you\0tlate\0\0") + message("Z", b"I")
FIELDS = {"S": "ERROR", "V": "ERROR", "C": "23503", "M": "no für you", "t": "late"}

CASES = {
    "done": (ROWS + DONE, None),
    "refused at once": (ERROR, FIELDS),
    "refused after rows": (ROWS + ERROR, FIELDS),
    "refused at commit": (ROWS + message("C", b"INSERT 0 1\0") + ERROR, FIELDS),
    "refused, then done": (ERROR + ROWS + DONE, None),
    "with a notice and a notification": (message("N", b"SNOTICE\0\0") + message("A", b"\0\0\0\1c\0\0") + DONE, None),
}


@pytest.mark.parametrize("label", CASES)
def test_however_it_is_cut(label: str, rng: random.Random) -> None:
    data, error = CASES[label]
    cuts = [[], range(1, len(data)), *(sorted(rng.sample(range(1, len(data)), 4)) for _ in range(200))]
    for cut in cuts:
        ear = Ear()
        for begin, end in zip([0, *cut], [*cut, len(data)], strict=True):
            ear.hear(data[begin:end])
        assert (ear.error, ear.understood) == (error, True), cut


def test_a_notification_behind_the_answer_changes_nothing() -> None:
    ear = Ear()
    ear.hear(ERROR + message("A", b"\0\0\0\1c\0\0"))
    assert (ear.error, ear.understood) == (FIELDS, True)


@pytest.mark.parametrize("start", range(1, len(DONE) - 6))
def test_what_begins_in_the_midst_of_a_message_is_not_understood(start: int) -> None:
    ear = Ear()
    ear.hear(DONE[start:])
    assert not ear.understood or start == DONE.index(b"Z"), DONE[start:]


def test_an_answer_without_its_end_is_not_understood() -> None:
    ear = Ear()
    ear.hear(DONE + ROWS)
    assert not ear.understood
