# ruff: noqa
# fmt: off
strategy="best_effort"
# Continue processing even if some queries fail
# Good for: logs, metrics, non-critical data
