# ruff: noqa
# fmt: off
# Export metrics in Prometheus format
result = await pool.process({
    "operation": "export_metrics"
})

prometheus_metrics = result["prometheus_metrics"]

# Save to file or serve via HTTP endpoint
with open("/var/lib/prometheus/connection_pool.prom", "w") as f:
    f.write(prometheus_metrics)
