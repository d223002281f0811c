"""Groups of changes shrink until they no longer hold their locks for long."""

from __future__ import annotations

from raypg.server.catalogue import HOLD, LEAST_GROUP, Catalogue


def test_groups_of_changes_are_bounded_in_time() -> None:
    catalogue = Catalogue()
    catalogue.took("update", 500, HOLD)
    assert catalogue.limit("update") is None
    catalogue.took("update", 500, 10 * HOLD)
    assert catalogue.limit("update") == 50
    catalogue.took("update", 50, 1000 * HOLD)
    assert catalogue.limit("update") == LEAST_GROUP
    assert catalogue.limit("delete") is None
    catalogue.took("update", LEAST_GROUP, HOLD / 2)
    assert catalogue.limit("update") is None


def test_it_forgets_rather_than_grow() -> None:
    catalogue = Catalogue()
    for number in range(5000):
        catalogue.took(f"update {number}", 100, 1.0)
        catalogue.refuse(f"insert {number}", 0.0)
    assert len(catalogue._limits) <= 1000
    assert len(catalogue._refused) <= 1000
    assert catalogue.refused("insert 4999", 1.0)
    assert not catalogue.refused("insert 4999", 1000.0)
