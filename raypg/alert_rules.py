"""Alert rules for Prometheus: the guide's two, and what else an operator of a database wants to be woken for."""

from __future__ import annotations

__all__ = ["RULES"]

RULES = """\
# Alert rules for raypg, written by `raypg metrics rules`. Name this file under rule_files in prometheus.yml.
groups:
  - name: raypg
    rules:
      # High error rate alert
      - alert: DatabaseErrorRateHigh
        expr: connection_pool_error_rate > 0.05
        for: 5m
        labels:
          severity: critical
        annotations:
          summary: "Database error rate above 5%"
          description: "Pool {{ $labels.pool }}: {{ $value | humanizePercentage }} of all calls failed."

      # Slow queries alert
      - alert: DatabaseSlowQueries
        expr: connection_pool_query_execution_ms{quantile="0.95"} > 1000
        for: 10m
        labels:
          severity: warning
        annotations:
          summary: "95th percentile query time above 1 second"
          description: "Pool {{ $labels.pool }}: {{ $value | humanize }} ms. See `raypg status --watch`."

      - alert: DatabaseCircuitBreakerOpen
        # Half open it only tries: one outage is one alert.
        expr: max by (pool) (connection_pool_circuit_breaker_state{state=~"open|half_open"}) == 1
        for: 1m
        labels:
          severity: critical
        annotations:
          summary: "The circuit breaker is open: no call reaches the database"
          description: "Pool {{ $labels.pool }}. `raypg status {{ $labels.pool }}` says why."

      - alert: DatabasePoolSaturated
        # One connection of the most is for control: of ten, nine can be in use.
        expr: >-
          connection_pool_utilization * connection_pool_max_connections
          >= 0.9 * (connection_pool_max_connections - 1) and connection_pool_queue_depth > 0
        for: 5m
        labels:
          severity: warning
        annotations:
          summary: "Nearly all connections are in use, and callers wait"
          description: "Pool {{ $labels.pool }}: {{ $value }} of its connections are in use."

      - alert: DatabasePoolExhausted
        expr: increase(connection_pool_exhaustion_events_total[5m]) > 0
        labels:
          severity: critical
        annotations:
          summary: "Callers waited in vain for a connection"
          description: "Pool {{ $labels.pool }}: {{ $value | humanize }} calls in five minutes."

      # Of pools with replicas.
      - alert: DatabaseReplicaLag
        expr: connection_pool_replica_lag_seconds > 30
        for: 5m
        labels:
          severity: warning
        annotations:
          summary: "A replica is behind"
          description: "Pool {{ $labels.pool }}, replica {{ $labels.replica }}: {{ $value | humanizeDuration }}."

      - alert: DatabasePoolWorkerDown
        expr: connection_pool_worker_up == 0
        for: 1m
        labels:
          severity: critical
        annotations:
          summary: "A worker of a pool is not heard of"
          description: "Pool {{ $labels.pool }}, worker {{ $labels.worker }}."

      - alert: DatabaseMetricsMissing
        expr: absent(connection_pool_info) or raypg_metrics_up == 0
        for: 5m
        labels:
          severity: warning
        annotations:
          summary: "Nothing is known of any database pool"
          description: "No pool runs, `raypg metrics serve` has ended, or the Metrics actor does not answer."
"""
