# ruff: noqa
# fmt: off
# Force circuit open (maintenance)
await pool.circuit_breaker.force_open("Database maintenance")

# Force circuit closed (after verification)
await pool.circuit_breaker.force_close("Maintenance complete")

# Check status
status = pool.circuit_breaker.get_status()
print(f"State: {status['state']}")
print(f"Failures: {status['metrics']['consecutive_failures']}")
