# ruff: noqa
# fmt: off
# Via API
import aiohttp

async with aiohttp.ClientSession() as session:
    await session.post("http://localhost:8080/api/alerts", json={
        "name": "High Latency Alert",
        "condition": "avg_query_time_ms > 100",
        "threshold": 100,
        "duration_seconds": 60,
        "severity": "warning"
    })
