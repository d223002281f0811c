"""Everything that speaks to PostgreSQL itself, without Ray: connections, resets, queues, leases."""
