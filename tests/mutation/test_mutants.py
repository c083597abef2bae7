"""Every planted bug can be planted, and is one of its own."""

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "mutation"))
    from mutant import all_mutants

    return all_mutants()


def test_every_original_occurs_exactly_once_and_its_tests_exist(mutants):
    assert {mutant.room for mutant in mutants} == {"kernels", "passes", "svg2_compile"}
    sources = {file: ROOT / file for file in {mutant.file for mutant in mutants}}
    sources = {file: path.read_text(encoding="utf-8") for file, path in sources.items() if path.exists()}
    stale = [each for each in mutants if sources.get(each.file, "").count(each.original) != 1]
    assert [(each.file, each.bug) for each in stale] == []
    assert [(each.bug, test) for each in mutants for test in each.tests if not (ROOT / test).exists()] == []


def test_every_mutant_has_tests_and_changes_something(mutants):
    assert [each.bug for each in mutants if not each.tests or each.original == each.replacement] == []


def test_no_two_mutants_are_the_same_bug(mutants):
    for name_of in (lambda each: each.bug, lambda each: (each.file, each.original, each.replacement)):
        assert [name for name, times in Counter(map(name_of, mutants)).items() if times > 1] == []
