"""Plausible one-line bugs of what is told from the graph: which rows attend to which, under what mask."""

from mutant import Mutant

CLASSIFYING = "passes/classify.py"
TRACING = "passes/trace_axis.py"

FOLDING = "passes/fold_axes.py"
READING = "passes/read_mask.py"
KEY_MASK = "kernels/key_mask.py"

CLASSIFY = ("tests/passes/test_classify.py",)
FOLD = ("tests/passes/test_fold_axes.py",)
MASKS = ("tests/passes/test_masks.py",)
KEY_MASKS = ("tests/kernels/test_key_mask.py",)
SPELLINGS = ("tests/passes/test_spellings_of_scores.py",)
SCORES = "passes/read_attention.py"
INLINING = "passes/inline_subgraphs.py"
INLINE = ("tests/passes/test_inline_subgraphs.py",)
CACHING = "passes/read_cache.py"
CACHE = ("tests/passes/test_read_cache.py",)
EXACT = ("tests/passes/test_exact_rows.py",)
EXACT_ROWS = "passes/split_exact_rows.py"

MUTANTS = (
    Mutant(
        "rows beside the exact ones taken for exact",
        EXACT_ROWS,
        "low <= start and end <= high",
        "low <= start or end <= high",
        EXACT,
    ),
    Mutant("rows counted from the first video row", EXACT_ROWS, "        first = last\n", "", EXACT),
    Mutant(
        "exact rows put behind the video",
        "passes/rewrite.py",
        "output, 2, done, done := _sum(writer, done, _difference(writer, end, start))",
        "output, 2, 0, _difference(writer, end, start)",
        EXACT,
    ),
    Mutant(
        "symbolic lengths cut at today's",
        EXACT_ROWS,
        "    is_known = len(symbolic) == 1 and is_guarded(segments[symbolic[0]].length)",
        "    is_known = True",
        EXACT,
    ),
    Mutant("what is written after the attention taken for written before", CACHING, " and user < reader", "", CACHE),
    Mutant("cached rows behind the new ones forgotten", CACHING, "    if at < rows:\n", "    if False:\n", CACHE),
    Mutant(
        "a part of the new rows taken for all",
        CACHING,
        "if (first, last) != (start, start + length):",
        "if False:",
        CACHE,
    ),
    Mutant(
        "a checkpoint inlined though gradients are computed",
        INLINING,
        "and _needs_gradients(node)",
        "and False",
        INLINE,
    ),
    Mutant(
        "every call of a region called like the first",
        INLINING,
        "return old[: place + 1], new[: place + 1]",
        "return old, old",
        INLINE,
    ),
    Mutant("what stays in a branch not looked for", INLINING, "                    yield node, body\n", "", INLINE),
    Mutant(
        "what changes along the keys taken for a shift",
        SCORES,
        " or same_size(sizes[axis], 1))",
        " or True)",
        SPELLINGS,
    ),
    Mutant(
        "a factor made of the scores taken for given",
        SCORES,
        "if any(node in plan.aside for node, _ in reads):",
        "if False:",
        SPELLINGS,
    ),
    Mutant(
        "a temperature after a bias forgets the bias",
        SCORES,
        "        if self.masks:\n            return Obstacle(",
        "        if False:\n            return Obstacle(",
        SPELLINGS,
    ),
    Mutant(
        "a temperature always multiplies",
        "passes/write_attention.py",
        "aten.div.Tensor if factor.divides else aten.mul.Tensor",
        "aten.mul.Tensor",
        SPELLINGS,
    ),
    Mutant(
        "a weight of keys taken for hiding them",
        KEY_MASK,
        "LARGEST_HIDING_BIAS = -9000.0",
        "LARGEST_HIDING_BIAS = -1.0",
        (*KEY_MASKS, *MASKS),
    ),
    Mutant("a mask to be added may hide every key", KEY_MASK, " & keys.any(-1).all()", "", KEY_MASKS),
    Mutant(
        "rows of a mask not compared",
        KEY_MASK,
        "(shown == keys).all(-1)",
        "(shown <= keys).all(-1)",
        (*KEY_MASKS, *MASKS),
    ),
    Mutant(
        "every empty row taken for padding", KEY_MASK, "~shown.any(-1) & ~keys[:, :, 0]", "~shown.any(-1)", KEY_MASKS
    ),
    Mutant("what is written over a constant mask overlooked", READING, " or is_written(x, x, end)", "", MASKS),
    Mutant("an infinite bias has no effect", READING, "bool(value.isfinite())", "True", MASKS),
    Mutant(
        "a mask read once though it is overwritten",
        "passes/rewrite.py",
        " or is_written(mask, masks[read][0], writer.node)",
        "",
        MASKS,
    ),
    Mutant(
        "context rows attend as if the mask only hid keys",
        "passes/rewrite.py",
        "    if dense is None:\n        return writer.emit(torch",
        "    if True:\n        return writer.emit(torch",
        MASKS,
    ),
    Mutant(
        "the rows of a mask not cut for the video rows",
        "passes/rewrite.py",
        "replace(dense, mask=_rows_of_mask(writer, dense.mask, asking_video))",
        "dense",
        MASKS,
    ),
    Mutant(
        "a mask that does more is not refused", "passes/plan.py", 'config.on_unsupported == "error"', "False", MASKS
    ),
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
