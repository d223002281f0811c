# ruff: noqa
# fmt: off
from raypg import QueryPipelineNode

# Create pipeline
pipeline = QueryPipelineNode(
    name="bulk_insert",
    connection_pool="main_pool",
    batch_size=100,           # Batch up to 100 queries
    flush_interval=0.1,       # Auto-flush every 100ms
    strategy="best_effort"    # Continue on individual failures
)

# Add queries to pipeline
for record in large_dataset:
    await pipeline.add_query(
        "INSERT INTO events (timestamp, type, data) VALUES ($1, $2, $3)",
        [record.timestamp, record.type, record.data]
    )

# Execute batch
results = await pipeline.flush()

# Check results
success_count = sum(1 for r in results if r.success)
print(f"Inserted {success_count}/{len(results)} records")
