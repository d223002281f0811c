# ruff: noqa
# fmt: off
from raypg import QueryPipelineNode

# Automatic optimization
pipeline = QueryPipelineNode(
    name="optimized_pipeline",
    connection_pool="main_pool",
    enable_optimization=True  # Reorder queries for performance
)

# Mixed operations - optimizer puts SELECTs first
await pipeline.add_query("INSERT INTO audit_log VALUES (...)")
await pipeline.add_query("SELECT * FROM users WHERE active = true")
await pipeline.add_query("UPDATE products SET stock = stock - 1")
await pipeline.add_query("SELECT COUNT(*) FROM orders")

# Optimizer reorders to: SELECT, SELECT, INSERT, UPDATE
results = await pipeline.flush()
