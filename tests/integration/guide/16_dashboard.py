# ruff: noqa
# fmt: off
# Enable monitoring in pool configuration
pool = WorkflowConnectionPool(
    name="monitored_pool",
    enable_monitoring=True,
    monitoring_port=8080,  # Dashboard port
    # ... other config ...
)

# Start dashboard
await pool.process({
    "operation": "start_monitoring"
})

# Access at http://localhost:8080
