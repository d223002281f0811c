# ruff: noqa
# fmt: off
# Default settings work well
circuit_breaker_failure_threshold=5
circuit_breaker_recovery_timeout=60
circuit_breaker_error_rate=0.5
