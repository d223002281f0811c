# ruff: noqa
# fmt: off
# Without pipelining - slow
start = time.time()
for i in range(1000):
    await pool.process({
        "operation": "execute",
        "query": "INSERT INTO test VALUES ($1)",
        "params": [i]
    })
individual_time = time.time() - start

# With pipelining - fast!
start = time.time()
for i in range(1000):
    await pipeline.add_query(
        "INSERT INTO test VALUES ($1)",
        [i]
    )
await pipeline.flush()
pipeline_time = time.time() - start

print(f"Speedup: {individual_time / pipeline_time:.1f}x")
# Typical speedup: 5-10x
