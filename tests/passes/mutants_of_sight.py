"""Plausible one-line bugs of what is told from the graph: which rows attend to which, under what mask."""

from mutant import Mutant

CLASSIFYING = "passes/classify.py"
TRACING = "passes/trace_axis.py"

FOLDING = "passes/fold_axes.py"

CLASSIFY = ("tests/passes/test_classify.py",)
FOLD = ("tests/passes/test_fold_axes.py",)

MUTANTS = (
    Mutant(
        "a mask's leading axes not expanded before they are folded",
        FOLDING,
        "mask = emit(graph, aten.expand.default, mask, [*leading, -1, -1, -1], like=like)",
        "pass",
        FOLD,
    ),
    Mutant("the first two of many leading axes folded alone", FOLDING, "x, 0, rank - 4, like", "x, 0, 1, like", FOLD),
    Mutant(
        "the options of a folded attention dropped",
        FOLDING,
        "*operands, like=node, **options)",
        "*operands, like=node)",
        FOLD,
    ),
    Mutant(
        "positions taken for the rows of the queries",
        TRACING,
        "        yield way\n",
        "        yield way\n        return\n",
        CLASSIFY,
    ),
    Mutant(
        "values not asked where what gates them leads astray",
        CLASSIFYING,
        " or shares_rows(value, 2, query, 2)",
        "",
        CLASSIFY,
    ),
    Mutant(
        "halves of one tensor taken for the same rows",
        TRACING,
        "None if self.window is None else (str(self.window.start), str(self.window.length))",
        "None",
        CLASSIFY,
    ),
    Mutant(
        "axes merged for queries and values apart taken for two streams",
        CLASSIFYING,
        " and not _meet_upstream(queries, values)",
        "",
        CLASSIFY,
    ),
    Mutant(
        "sequences joined of pieces of equal lengths taken for one",
        TRACING,
        "if any(each.place in passed for way in ways for each in way if isinstance(each, Cursor)):",
        "if True:",
        CLASSIFY,
    ),
)
