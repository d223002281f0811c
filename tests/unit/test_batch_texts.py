"""What a batch of Arrow data announces that it writes to."""

from __future__ import annotations

from raypg.server.writes import Writes
from raypg.server.writing import Spec


def test_a_batch_writes_to_its_table_and_to_what_it_needs_of_the_ledger() -> None:
    plain = Spec((None, 'odd"one'), "append", None, "node", None, "fail", False, 0)
    own, batches, refused = 'TRUNCATE "odd""one"', "TRUNCATE raypg.batches", "TRUNCATE raypg.quarantine"
    for spec, texts in (
        (plain, [own]),
        (plain._replace(into=("s", "t")), ['TRUNCATE "s"."t"']),
        (plain._replace(batch_id="b"), [own, batches]),
        (plain._replace(on_bad_rows="quarantine"), [own, refused]),
        (plain._replace(batch_id="b", on_bad_rows="quarantine"), [own, batches, refused]),
    ):
        assert Writes.texts_of_batch(spec) == texts
