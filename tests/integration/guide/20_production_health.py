# ruff: noqa
# fmt: off
# Regular health check
async def monitor_pool_health(pool):
    while True:
        status = await pool.process({
            "operation": "get_comprehensive_status"
        })

        # Check circuit breaker
        if status["circuit_breaker"]["state"] != "closed":
            alert("Circuit breaker is open!")

        # Check error rate
        if status["error_rate"] > 0.05:
            alert(f"High error rate: {status['error_rate']:.2%}")

        # Check pool saturation
        if status["utilization_rate"] > 0.9:
            alert("Pool near saturation!")

        # Check query latency
        p95_latency = status["detailed_metrics"]["histograms"]["query_execution_ms"]["p95"]
        if p95_latency > 1000:
            alert(f"Slow queries detected: P95={p95_latency}ms")

        await asyncio.sleep(60)  # Check every minute
