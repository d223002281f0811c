# ruff: noqa
# fmt: off
strategy="parallel"
# Execute SELECT queries concurrently
# Good for: analytics, reporting
