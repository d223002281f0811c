"""Asking the Metrics actor for alerts, and changing their rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raypg.core.alerts import MOST_REMEMBERED
from raypg.metrics_access import ANSWER_WITHIN, ask_metrics

__all__ = ["add_alert", "alerts", "delete_alert"]


async def alerts(
    pool: str | None = None, history: int = MOST_REMEMBERED, names: bool = True, within: float = ANSWER_WITHIN
) -> dict[str, Any]:
    """The rules of alerts, and what has become of them.

    Args:
        pool: only what is for this one.
        history: how many alerts of the past.
        names: whether with the figures that a condition may name.
        within: seconds in which it must be answered.

    Returns:
        ``rules``; ``active`` (what is pending or fires, the worst first); ``history`` (what has fired, the newest
        first); ``webhooks`` (how many messages wait or were lost, and the trouble with each address); ``names`` (each
        figure with what it means). Rules have the fields of :class:`raypg.core.alert_rule.Rule`, alerts those of
        :class:`raypg.core.alerts.Alert`.

    Raises:
        UnavailableError: the Metrics actor does not answer.
    """
    return await ask_metrics("alerts", pool, history, names, within=within)  # type: ignore[no-any-return]


async def add_alert(rule: Mapping[str, Any]) -> str:
    """Watch a rule from now on, and in every later life of the Metrics actor; its id. A rule that says the same as
    another is that one.

    Args:
        rule: ``name`` and ``condition``, and what it does not leave to the defaults of
            :class:`raypg.core.alert_rule.Rule`: ``threshold``, ``duration_seconds``, ``cooldown_seconds``,
            ``severity``, ``pool``, ``webhook_url``.

    Raises:
        UnknownFigureError: its condition names a figure that there is not.
        ConfigError: something else is wrong with it.
        UnavailableError: the Metrics actor does not answer.
    """
    return (await ask_metrics("add_alert", dict(rule)))["id"]  # type: ignore[no-any-return]


async def delete_alert(id: str) -> None:
    """Watch this rule no more; what it fired is resolved.

    Raises:
        AlertRuleNotFoundError: there is none of this id.
        UnavailableError: the Metrics actor does not answer.
    """
    await ask_metrics("delete_alert", id)
