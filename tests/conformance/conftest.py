"""The laws are exact: 64-bit arithmetic, unless a test asks for less."""

import pytest


@pytest.fixture(autouse=True)
def exact(x64: None) -> None:
    pass


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All laws of a row one after another and, under xdist, in one process: they share what adapting it compiles."""
    row_of = lambda item: getattr(item, "callspec", None) and item.callspec.params.get("row")
    places = [i for i, item in enumerate(items) if row_of(item) is not None and hasattr(row_of(item), "method")]
    rows = [items[i] for i in places]
    order = {}
    for item in rows:
        order.setdefault(row_of(item).name, len(order))
        item.add_marker(pytest.mark.xdist_group(row_of(item).name))
    for i, item in zip(places, sorted(rows, key=lambda item: order[row_of(item).name]), strict=True):
        items[i] = item
