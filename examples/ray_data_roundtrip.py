"""Ray Data reads a table in shards, changes it, and writes it into another one: each row once, over one pool.

    ray job submit -- python examples/ray_data_roundtrip.py

Where the database is, PGHOST, PGPORT, PGDATABASE and PGUSER say, and PGPASSWORD or ~/.pgpass has the password: set
them on the cluster's nodes, not with --runtime-env, which Ray shows to everybody.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data.expressions import col

from raypg import PostgresDatasink, PostgresDatasource, WorkflowConnectionPool

ROWS = 100_000
MAKE = """
INSERT INTO temperatures
SELECT n, timestamptz '2024-01-01 00:00+00' + n * interval '1 s', 50 + n % 50 FROM generate_series(1, $1::int) n
"""


def in_celsius(block: pa.Table) -> pa.Table:
    """A block with its temperatures in °C."""
    celsius = pc.divide(pc.multiply(pc.subtract(block["fahrenheit"], 32.0), 5.0), 9.0)
    return block.drop_columns("fahrenheit").append_column("celsius", celsius)


def main() -> None:
    """Make a table, and let Ray Data convert its warm rows."""
    pool = WorkflowConnectionPool(name="temperatures", max_connections=6)
    pool.sync.process({"operation": "initialize"})
    pool.sync.execute("DROP TABLE IF EXISTS temperatures, converted")
    pool.sync.execute("CREATE TABLE temperatures (id bigint PRIMARY KEY, at timestamptz, fahrenheit float8)")
    pool.sync.execute("CREATE TABLE converted (id bigint PRIMARY KEY, at timestamptz, celsius float8)")
    pool.sync.execute(MAKE, ROWS)

    # All read tasks see one snapshot; the filter runs in the server. Each task reads over the pool, within its cap.
    source = PostgresDatasource(pool, table="temperatures")
    warm = source.dataset().filter(expr=col("fahrenheit") >= 75.0)

    # A task that Ray has to run again writes nothing twice. With write_id="…" a whole write can be repeated so.
    sink = PostgresDatasink(pool, "converted")
    warm.map_batches(in_celsius, batch_format="pyarrow").write_datasink(sink)
    source.close()

    count, least = pool.sync.fetchrow("SELECT count(*), min(celsius) FROM converted")
    print(f"{count} of {ROWS} temperatures are in °C, the lowest is {least:.1f}")
    pool.sync.close()  # without this the pool would stay, for the next job to find


if __name__ == "__main__":
    ray.init()
    main()
