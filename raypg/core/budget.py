"""The budget of a pool: how its cap is divided among those who hold connections, and how shares move.

Shares are granted by messages that may be lost, late or overtaken, to workers that may die or fall silent. The sum
stays within the cap all the same by one rule: **every account is charged with the most that it may hold**, which is the
largest of

- the share that it is to have from now on,
- the last grant that it has answered, and every grant that was sent since and may still reach it,
- the connections that it said it holds.

So a share that shrinks frees nothing before its holder has *answered*, and a share grows only by what is free. An
account whose holder is lost stays charged until its connections are known to be gone.

Pure: no clock, no I/O. Keys are anything hashable: a worker, or a worker and a server.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from raypg.core.sizing import targets

__all__ = ["Account", "Budget"]

Key = TypeVar("Key", bound=Hashable)

SAMPLES = 3
"""Answers over which demand is averaged: what lasts a second moves no share."""


@dataclass
class Account:
    """What one holder is granted, and what it may hold.

    Attributes:
        share: what it is to have.
        told: the grant that it has answered last.
        unanswered: grants that were sent since, by the number of their message.
        used: connections that it held at its last answer.
        live: whether it takes part in the division.
        demand: connections that it had work for, at its last answers.
    """

    share: int = 0
    told: int = 0
    unanswered: dict[int, int] = field(default_factory=dict)
    used: int = 0
    live: bool = True
    demand: list[int] = field(default_factory=list)

    @property
    def charge(self) -> int:
        """The most connections that it may hold."""
        return max(self.share, self.told, self.used, *self.unanswered.values())

    @property
    def wanted(self) -> float:
        """Connections that it had work for lately, on average."""
        return sum(self.demand) / len(self.demand) if self.demand else 0.0


class Budget(Generic[Key]):
    """Divides *cap* connections.

    Args:
        cap: most that may exist.
        reserved: how many of them are kept free of accounts, for control.
    """

    def __init__(self, cap: int, reserved: int = 0) -> None:
        self.cap = cap
        self.reserved = reserved
        self.accounts: dict[Key, Account] = {}

    @property
    def charged(self) -> int:
        """Most connections that holders may have now: at most the cap, unless that was lowered and what is above it has
        not come back yet."""
        return sum(account.charge for account in self.accounts.values())

    # --- who takes part ---

    def join(self, key: Key, told: int = 0, used: int = 0) -> None:
        """A holder is there, with an account of its own from now on.

        Args:
            told: what it was granted by somebody before us, if it was.
            used: connections that it holds.
        """
        self.accounts[key] = Account(share=told, told=told, used=used)

    def stop(self, key: Key) -> None:
        """The holder is to get no more: it is draining, or lost. It stays charged with what it may hold."""
        account = self.accounts[key]
        account.live, account.share = False, 0

    def resume(self, key: Key) -> None:
        """A holder that was lost is there again."""
        self.accounts[key].live = True

    def ended(self, key: Key, connections: int) -> None:
        """So many connections of a lost holder are gone for certain, and cannot come back."""
        account = self.accounts[key]
        account.told = max(0, account.charge - connections)
        account.used, account.unanswered = 0, {}

    def leave(self, key: Key) -> None:
        """The holder holds nothing, and never will."""
        self.accounts.pop(key, None)

    # --- shares ---

    def divide(self) -> None:
        """Decide anew who is to have how much: what shrinks at once, what grows as far as something is free."""
        live = {key: account for key, account in self.accounts.items() if account.live}
        lost = sum(account.charge for account in self.accounts.values() if not account.live)
        wanted = targets(
            max(0, self.cap - self.reserved - lost),
            {key: account.share for key, account in live.items()},
            {key: account.wanted for key, account in live.items()},
        )
        for key, account in live.items():
            account.share = min(account.share, wanted[key])
        free = self.cap - self.reserved - self.charged
        growing = {key for key, account in live.items() if account.share < wanted[key]}
        while growing:
            # Those with least first: nobody is to be without a connection while another one gets its second.
            key = min(growing, key=lambda key: live[key].share)
            account = live[key]
            before = account.charge
            account.share += 1
            cost = account.charge - before  # nothing, for what it gave up just now
            if cost > free:
                account.share -= 1
                growing.remove(key)
                continue
            free -= cost
            if account.share == wanted[key]:
                growing.remove(key)

    def send(self, key: Key, number: int) -> int:
        """The grant to send to *key* with message *number*. Numbers grow from message to message, and a holder takes no
        grant older than one that it has answered."""
        account = self.accounts[key]
        account.unanswered[number] = account.share
        return account.share

    def answered(self, key: Key, number: int, used: int, demand: int) -> None:
        """*key* has answered message *number*: it holds *used* connections, and has work for *demand*."""
        account = self.accounts[key]
        if number not in account.unanswered:
            return  # of an earlier life, or overtaken by a later answer
        account.told = account.unanswered[number]
        account.unanswered = {later: grant for later, grant in account.unanswered.items() if later > number}
        account.used = used
        account.demand = [*account.demand[1 - SAMPLES :], demand]
