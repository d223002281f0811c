# ruff: noqa
# fmt: off
await pool.process({
    "operation": "stop_monitoring"
})
