# ruff: noqa
# fmt: off
from raypg import WorkflowConnectionPool

# Get comprehensive metrics
pool = WorkflowConnectionPool(
    name="metrics_pool",
    metrics_retention_minutes=60,  # Keep 1 hour of detailed metrics
    # ... other config ...
)

# Get all metrics
metrics = await pool.process({
    "operation": "get_comprehensive_status"
})

# Key metrics
print(f"Queries/sec: {metrics['queries_per_second']:.1f}")
print(f"Error rate: {metrics['error_rate']:.2%}")
print(f"P95 latency: {metrics['detailed_metrics']['histograms']['query_execution_ms']['p95']:.1f}ms")
