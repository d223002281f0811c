"""Batches of Arrow data as a worker takes them in: from Ray's object store, and no further than one process."""

from __future__ import annotations

from typing import Any

from ray.exceptions import ObjectLostError, OwnerDiedError, RayTaskError

from raypg.errors import DataLostError
from raypg.server.writing import Intake, Spec

__all__ = ["Intake", "write"]


async def write(intake: Intake, job: str, spec: tuple[Any, ...], reference: Any) -> tuple[int, int, int, bool]:
    """Write the batch behind *reference*; see :meth:`Intake.write`. It is dropped right after.

    Raises:
        DataLostError: it is gone, or the task that was to make it has failed.
    """

    async def fetch() -> Any:
        try:
            return await reference
        except OwnerDiedError as error:
            raise DataLostError(
                "the process that owned the data has died, and the data with it; nothing of its batch was written"
            ) from error
        except ObjectLostError as error:
            raise DataLostError(
                f"the data is lost ({type(error).__name__}); nothing of its batch was written"
            ) from error
        except RayTaskError as error:
            raise DataLostError(f"the task that was to make the data has failed: {error.cause!r}") from error

    return await intake.write(job, Spec(*spec), fetch)
