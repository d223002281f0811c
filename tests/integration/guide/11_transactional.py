# ruff: noqa
# fmt: off
strategy="transactional"
# All queries succeed or all fail (ACID)
# Good for: financial transactions, critical updates
