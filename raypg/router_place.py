"""Where a statement of a router is to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from raypg import messages
from raypg.core.classifier import Classification
from raypg.core.seen import NOTHING, Token
from raypg.reading import Served

if TYPE_CHECKING:
    from raypg.dispatch import Dispatcher
    from raypg.lease import LeasedConnection
    from raypg.router_sessions import RouterSession

__all__ = ["ON_PRIMARY", "Place", "is_change"]

ON_PRIMARY: Final = Served("primary", None, False, NOTHING)

_PREPARED = ("COMMIT PREPARED", "ROLLBACK PREPARED")


class Place:
    """Where a statement is to run, and why; then who has answered it."""

    __slots__ = ("avoid", "dispatcher", "lease", "must_see", "seconds", "session", "settings", "verdict", "who")

    def __init__(
        self,
        dispatcher: Dispatcher,
        session: RouterSession,
        verdict: Classification,
        lease: LeasedConnection | None,
        settings: messages.Settings,
        seconds: float,
    ) -> None:
        self.dispatcher = dispatcher
        self.session = session
        self.verdict = verdict
        self.lease = lease
        self.settings = settings
        self.seconds = seconds
        self.who = ON_PRIMARY
        self.must_see: Token = NOTHING
        self.avoid: tuple[str, ...] = ()

    def answered_by(self, who: Served) -> None:
        """It was *who*."""
        self.who = who


def is_change(verdict: Classification) -> bool:
    """Whether it begins, ends or divides a transaction."""
    return verdict.kind == "TRANSACTION" and verdict.statements == 1 and verdict.command not in _PREPARED
