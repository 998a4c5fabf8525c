"""Every public docstring has an example, and each example does what it shows."""

import doctest
import inspect

import pytest

import bioscan_jax as bj

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITHOUT = {"PRESETS"}
"""Not a function or class; its docstring is a literal below it."""


@pytest.mark.parametrize("name", sorted(set(bj.__all__) - WITHOUT))
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = getattr(bj, name)
    names = {"bj": bj} | {public: getattr(bj, public) for public in bj.__all__}
    found = doctest.DocTestFinder(exclude_empty=True).find(value, name, extraglobs=names)
    if inspect.isclass(value):
        found = [one for one in found if one.examples]
    assert any(one.examples for one in found), f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for one in found:
        report: list[str] = []
        runner.run(one, out=report.append)
        assert not report, "".join(report)
