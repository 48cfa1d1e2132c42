"""Requests that schemathesis makes of the server's OpenAPI document, valid ones and others: none may be answered by a bug."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.serve.places import Places
from benchmarks.serve.server import Load, running

Row = dict[str, Any]

# Each for a half of the cases.
_MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
_CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


def cases(places: Places) -> Iterator[Row]:
    """The whole of it."""
    bank = places.small_bank("schema")
    with running([bank], bank.parent / "served") as server:
        load = Load(server, "bottle", places.folder(100)[:20], 2)
        load.start().join()
        names = [item.picture["id"] for item in load.answered]
        yield try_cases(server.url, names, places.cases)
    shutil.rmtree(bank.parent)


def try_cases(url: str, pictures: list[str], count: int) -> Row:
    """Send about `count` requests to a server, half of which its document forbids.

    Args:
        url: of the server.
        pictures: ids of pictures; half of the requests about one are about one of these.
        count: how many requests.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    each = -(-count // (len(operations) * len(_MODES)))
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    for operation in operations:
        for mode in _MODES:
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except Exception as error:  # what has nothing that could be wrong has no negative cases
                if mode == GenerationMode.POSITIVE:
                    faults.append(f"{operation.label}: {error!r}")
                continue
            _try(operation.label, strategy, each, pictures, statuses, faults)
    return {
        "cases": sum(statuses.values()),
        "operations": len(operations),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "faults": faults[:20],
    }


def _try(label: str, strategy: Any, each: int, pictures: list[str], statuses: Counter[int], faults: list[str]) -> None:
    """Send the cases of one operation."""

    @seed(0)
    @settings(max_examples=each, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=strategy)
    def send(case: Any) -> None:
        number = sum(statuses.values())
        if pictures and number % 2 and "id" in (case.path_parameters or {}) and "/pictures/" in label:
            case.path_parameters["id"] = pictures[number % len(pictures)]
        if "bank" in (case.path_parameters or {}) and number % 4:
            case.path_parameters["bank"] = "bottle"
        response = case.call(timeout=60)
        statuses[response.status_code] += 1
        try:
            # 503 is a promise: the same request may succeed later.
            checks = _CHECKS if response.status_code == 503 else [not_a_server_error, *_CHECKS]
            case.validate_response(response, checks=checks)
        except BaseException as error:  # schemathesis raises groups of failures
            if isinstance(error, KeyboardInterrupt):
                raise
            told = "; ".join(str(part) for part in getattr(error, "exceptions", [error]))
            faults.append(f"{label} {response.status_code}: {told[:600]}")

    try:
        send()
    except Exception as error:
        if "Unsatisfiable" not in type(error).__name__:
            faults.append(f"{label}: {error!r}"[:600])
