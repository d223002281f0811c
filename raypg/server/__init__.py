"""Everything that speaks to PostgreSQL itself, without Ray: connections, resets, the set of connections of one worker."""
