# ruff: noqa
# fmt: off
# Open circuit quickly, recover slowly
circuit_breaker_failure_threshold=3
circuit_breaker_recovery_timeout=120
circuit_breaker_error_rate=0.1
