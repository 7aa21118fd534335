"""The public list: every method there is, and nothing else."""

import importlib
import pkgutil

import apportion
from apportion import credit


def written() -> set[str]:
    """Every decorated credit function in the private files."""
    names = set()
    for info in pkgutil.iter_modules(credit.__path__):
        module = importlib.import_module(f"apportion.credit.{info.name}")
        names |= {n for n, f in vars(module).items() if hasattr(f, "role") and f.__module__ == module.__name__}
    return names


def test_every_method_that_is_written_is_exported():
    assert {"capo", "gae", "group_relative", "whiten"} <= written() <= set(credit.__all__)


def test_the_list_is_sorted_and_holds_only_our_own():
    assert list(credit.__all__) == sorted(credit.__all__)
    assert all(getattr(credit, name).__module__.startswith("apportion.credit") for name in credit.__all__)


def test_the_package_exports_the_same_objects():
    assert set(credit.__all__) < set(apportion.__all__)
    assert all(getattr(apportion, name) is getattr(credit, name) for name in credit.__all__)


def test_every_method_says_where_it_comes_from_and_what_it_costs():
    for name in written():
        for field in ("Source:", "Cost:"):
            assert field in getattr(credit, name).__doc__, f"the docstring of {name} has no field {field}"
