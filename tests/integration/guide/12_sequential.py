# ruff: noqa
# fmt: off
strategy="sequential"
# Execute in order, stop on first failure
# Good for: dependent queries, migrations
