"""Every error of raypg arrives in another process as it left: class, text, attributes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import ray

import raypg
from raypg import errors
from raypg.packing import pack, unpack
from raypg.portable import pack_error, unpack_error

SAMPLES: dict[str, errors.RaypgError] = {
    type(error).__name__: error
    for error in [
        errors.RaypgError("it"),
        errors.ConfigError("port=0: wrong"),
        errors.UnknownFigureError("rate > 1", "rate", ["error_rate", "queue_depth"], "error_rate"),
        errors.AlertRuleNotFoundError("latenzy", ["latency"], "latency"),
        errors.StatementNotAllowedError("BEGIN"),
        errors.PoolNotFoundError("main", ["a", "b"]),
        errors.PoolNotInitializedError("first"),
        errors.PoolConflictError("main", {"hosts": (["a:1"], ["b:2"])}, True),
        errors.PoolVersionError("main", {"ray": ("2.60", "2.61")}),
        errors.UnavailableError("now"),
        errors.PoolClosedError("closed"),
        errors.WorkerDrainingError("draining"),
        errors.CircuitBreakerError("main", "open", "5 failures in a row", 12.5, True),
        errors.PoolExhaustedError("main", 1.5, 10, 20, 4, "full"),
        errors.ConnectError("refused", "authentication_failed", "28P01"),
        errors.ConnectionLostError("lost"),
        errors.QueryTimeoutError("slow", 0.5),
        errors.ArrowValueError("at", "timestamp", "timestamp[us]", "infinity"),
        errors.SnapshotLostError("too late"),
        errors.OutcomeUnknownError("lost", "INSERT …"),
        errors.ResultLostError("unread", "INSERT …"),
        errors.LeaseLostError("gone"),
        errors.TransactionRolledBackError("rolled back"),
        errors.StatementNotRunError("not run", "p-1"),
        errors.PipelineClosedError("closed"),
        errors.IncompatibleDataError("no", "id", "string", "integer"),
        errors.BatchConflictError("load", "monday/0", "events"),
        errors.LedgerError("GRANT"),
        errors.DataLostError("gone"),
    ]
}


def seen(error: BaseException) -> tuple[Any, ...]:
    return type(error), str(error), error.args, {key: value for key, value in vars(error).items() if key[0] != "_"}


def test_there_is_a_sample_of_every_class() -> None:
    classes = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.RaypgError)
    }
    assert set(SAMPLES) == classes == set(errors.__all__)
    assert all(getattr(raypg, name) is getattr(errors, name) for name in classes)


def test_no_sample_uses_a_default_for_an_argument() -> None:
    """Or the tests below would not notice that it is lost."""
    for name, error in SAMPLES.items():
        init = vars(type(error)).get("__init__")
        names = [] if init is None else list(inspect.signature(init).parameters)[1:]
        for parameter, value in zip(names, error.args, strict=False):
            assert getattr(error, parameter) == value, (name, parameter)
        assert len(error.args) >= len(names), name


@pytest.mark.parametrize("name", SAMPLES)
def test_it_survives_pickle_copy_and_our_messages(name: str) -> None:
    error = SAMPLES[name]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert seen(pickle.loads(pickle.dumps(error, protocol))) == seen(error)
    assert seen(ray.cloudpickle.loads(ray.cloudpickle.dumps(error))) == seen(error)
    assert seen(copy.copy(error)) == seen(error)
    assert seen(unpack_error(unpack(pack(pack_error(error))))) == seen(error)


@pytest.mark.parametrize("name", SAMPLES)
def test_its_classes_say_how_to_handle_it(name: str) -> None:
    error = SAMPLES[name]
    unavailable = {
        "UnavailableError",
        "CircuitBreakerError",
        "PoolClosedError",
        "PoolExhaustedError",
        "ConnectError",
        "ConnectionLostError",
        "WorkerDrainingError",
    }
    assert isinstance(error, errors.UnavailableError) == (name in unavailable)
    assert isinstance(error, TimeoutError) == (name in {"PoolExhaustedError", "QueryTimeoutError"})
    assert isinstance(error, ConnectionError) == (name in {"ConnectError", "ConnectionLostError"})
    assert isinstance(error, ValueError) == (
        name in {"ConfigError", "UnknownFigureError", "StatementNotAllowedError", "ArrowValueError"}
    )
    assert isinstance(error, LookupError) == (name in {"PoolNotFoundError", "AlertRuleNotFoundError"})


def test_texts_say_what_to_do() -> None:
    assert "a, b" in str(SAMPLES["PoolNotFoundError"])
    assert "none" in str(errors.PoolNotFoundError("main"))
    assert "raypg down main" in str(SAMPLES["PoolConflictError"])
    assert "another name" in str(SAMPLES["PoolConflictError"])
    assert "reconfigure" in str(errors.PoolConflictError("main", {"max_connections": (1, 2)}))
    assert "raypg down main" in str(SAMPLES["PoolVersionError"])
    assert "ray 2.60 there, 2.61 here" in str(SAMPLES["PoolVersionError"])
    assert "10 of 20" in str(SAMPLES["PoolExhaustedError"])
    assert "1.5 s" in str(errors.PoolExhaustedError("main", 1.5, 10, 20, 4))
    assert "INSERT …" in str(SAMPLES["OutcomeUnknownError"])
    assert str(SAMPLES["ResultLostError"]) == "unread [INSERT …]"


def test_they_survive_ray(ray_cluster: Any) -> None:
    """As ``raise`` in a task, which Ray wraps, and as a value, which is how raypg sends them."""

    class Thrower:
        def throw(self, error: Exception) -> None:
            raise error

        def give(self, given: list[Exception]) -> list[Exception]:
            return given

    thrower: Any = ray.remote(Thrower).options(num_cpus=0).remote()
    try:
        sent = list(SAMPLES.values())
        assert [seen(error) for error in ray.get(thrower.give.remote(sent))] == [seen(error) for error in sent]
        references = [thrower.throw.remote(error) for error in sent]
        for error, reference in zip(sent, references, strict=True):
            with pytest.raises(type(error)) as caught:
                ray.get(reference)
            assert seen(caught.value.cause) == seen(error)  # type: ignore[attr-defined]
    finally:
        ray.kill(thrower)
