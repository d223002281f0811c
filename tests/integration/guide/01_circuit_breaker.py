# ruff: noqa
# fmt: off
from raypg import WorkflowConnectionPool

# Circuit breaker is automatically configured
pool = WorkflowConnectionPool(
    name="protected_pool",
    database_type="postgresql",
    # ... connection details ...

    # Circuit breaker configuration
    circuit_breaker_failure_threshold=5,    # Open after 5 consecutive failures
    circuit_breaker_recovery_timeout=60,    # Try recovery after 60 seconds
    circuit_breaker_error_rate=0.5         # Open if error rate > 50%
)

# Use normally - circuit breaker protects automatically
try:
    result = await pool.process({
        "operation": "acquire"
    })
except CircuitBreakerError as e:
    # Circuit is open - database is failing
    logger.error(f"Database unavailable: {e}")
    # Return cached data or degraded response
