# ruff: noqa
# fmt: off
from raypg import WorkflowConnectionPool, QueryPipelineNode
from raypg import QueryRouterNode

# Create fully configured production pool
pool = WorkflowConnectionPool(
    name="production_pool",
    database_type="postgresql",
    host="db.production.internal",
    port=5432,
    database="main_db",
    user="app_user",
    password="secure_password",

    # Connection limits
    min_connections=10,
    max_connections=100,

    # Phase 1: Core features
    health_threshold=70,
    pre_warm=True,

    # Phase 2: Intelligence
    adaptive_sizing=True,
    enable_query_routing=True,

    # Phase 3: Production hardening
    circuit_breaker_failure_threshold=5,
    circuit_breaker_recovery_timeout=60,
    circuit_breaker_error_rate=0.5,
    metrics_retention_minutes=60,
    enable_pipelining=True,
    pipeline_batch_size=200,
    enable_monitoring=True,
    monitoring_port=8080
)

# Initialize pool
await pool.process({"operation": "initialize"})

# Create router for intelligent query routing
router = QueryRouterNode(
    name="production_router",
    connection_pool="production_pool",
    enable_read_write_split=True,
    cache_size=1000,
    pattern_learning=True
)

# Create pipeline for bulk operations
pipeline = QueryPipelineNode(
    name="bulk_pipeline",
    connection_pool="production_pool",
    batch_size=200,
    strategy="best_effort"
)

# Start monitoring
await pool.process({"operation": "start_monitoring"})

# Use in production
try:
    # Normal queries through router
    result = await router.process({
        "query": "SELECT * FROM users WHERE active = true",
        "operation": "execute"
    })

    # Bulk operations through pipeline
    for record in bulk_data:
        await pipeline.add_query(
            "INSERT INTO events VALUES ($1, $2, $3)",
            [record.id, record.type, record.data]
        )
    await pipeline.flush()

except CircuitBreakerError:
    # Handle database unavailability
    logger.error("Database circuit breaker open!")
    # Use cache or return degraded response
