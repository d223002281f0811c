# ruff: noqa
# fmt: off
error_summary = metrics['detailed_metrics']['errors']

# Total errors
print(f"Total errors: {error_summary['total_errors']}")

# Breakdown by category
for category, count in error_summary['errors_by_category'].items():
    print(f"{category}: {count}")

# Categories include:
# - connection_timeout
# - connection_refused
# - authentication_failed
# - query_timeout
# - query_error
# - pool_exhausted
