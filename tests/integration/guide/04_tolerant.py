# ruff: noqa
# fmt: off
# Allow more failures before opening
circuit_breaker_failure_threshold=10
circuit_breaker_recovery_timeout=30
circuit_breaker_error_rate=0.7
