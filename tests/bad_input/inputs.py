"""Inputs that are nearly right, and how a reader may end on them."""

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from metroem.errors import MetroEMError

# (reader, "read", "refused" or "other") -> how many inputs ended so.
TRIED: Counter[tuple[str, str]] = Counter()
MOST_SECONDS = 10.0

WORDS = ["", "x", "../..", "/etc/passwd", "a\x00b", "\ud800", "1", "\u0661", "é" * 300]
NUMBERS = [0, 1, -1, 2, 7, 64, 2**31, 2**63, 10**400, 0.5, -0.5, 1e-300, 1e300]
NUMBERS += [math.inf, -math.inf, math.nan, True, False]
VALUES = st.recursive(
    st.none() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*WORDS, "type", "path"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def tried(number: int) -> settings:
    """So many inputs, the same ones in each run."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def ends_well(reader: str, call: Callable[[], Any]) -> str:
    """Run a reader: it may return, or raise an error of ours, soon.

    Returns:
        "read" or "refused".

    Raises:
        Whatever else it raises.
    """
    start, ended = time.monotonic(), "other"
    try:
        call()
        ended = "read"
    except MetroEMError as error:
        assert str(error).strip(), "a refusal without a message"
        ended = "refused"
    finally:
        TRIED[reader, ended] += 1
    assert time.monotonic() - start < MOST_SECONDS
    return ended


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values of a decoded JSON, the whole itself first."""
    found = [path]
    inside = tree.items() if isinstance(tree, dict) else ()
    inside = enumerate(tree) if isinstance(tree, list) else inside
    for key, value in inside:
        found += places(value, (*path, key))
    return found


@st.composite
def nearly(draw: Any, tree: Any) -> Any:
    """A decoded JSON with one to three things changed, dropped, doubled or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            continue
        *outer, key = path
        parent = tree
        for step in outer:
            parent = parent[step]
        change = draw(st.sampled_from(["replace", "replace", "drop", "double", "name"]))
        if change == "replace":
            parent[key] = draw(VALUES)
        elif change == "drop":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[draw(st.sampled_from([*WORDS, f"{key} "]))] = parent.pop(key)
    return tree


@st.composite
def broken_text(draw: Any, text: str) -> bytes:
    """A text cut short, with bytes changed, or with something else in it."""
    content = bytearray(text.encode())
    change = draw(st.sampled_from(["cut", "flip", "insert", "deep"]))
    at = draw(st.integers(0, len(content)))
    if change == "cut":
        return bytes(content[:at])
    if change == "flip" and at < len(content):
        content[at] ^= 1 << draw(st.integers(0, 7))
    elif change == "insert":
        content[at:at] = draw(st.binary(max_size=8))
    elif change == "deep":
        content[at:at] = draw(st.sampled_from([b"[", b'{"a":'])) * 2000
    return bytes(content)


def encoded(tree: Any) -> bytes:
    """JSON as a file has it; NaN and lone surrogates as Python writes them."""
    return json.dumps(tree).encode()
