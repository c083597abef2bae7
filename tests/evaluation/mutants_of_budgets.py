"""Bugs in the calibration of budgets, and the tests that must notice them."""

from mutant import Mutant

ALLOCATE = "svg2_compile/calibration/allocate.py"
SVOO = "svg2_compile/calibration/svoo.py"
TRY = "svg2_compile/calibration/try_budgets.py"

ALLOCATION = ("tests/evaluation/test_allocate.py",)
RULES = ("tests/evaluation/test_svoo.py",)
TRYING = ("tests/evaluation/test_try_budgets.py",)

MUTANTS = (
    Mutant("candidates above the hull are taken", ALLOCATE, "hull.pop()", "break", ALLOCATION),
    Mutant("dearest steps first", ALLOCATE, "(-_saved(costs[head],", "(_saved(costs[head],", ALLOCATION),
    Mutant("more is spent than there is", ALLOCATE, "if spent + cost > limit:", "if spent > limit:", ALLOCATION),
    Mutant("the last step is not taken in part", ALLOCATE, "Place(low, high, share)", "Place(low, low)", ALLOCATION),
    Mutant(
        "candidates with more error are on the hull",
        ALLOCATE,
        "errors[each] >= errors[hull[-1]]",
        "errors[each] > errors[hull[-1]] + 1",
        ALLOCATION,
    ),
    Mutant("too small a density is accepted", ALLOCATE, "if spent > limit * (1 + 1e-9):", "if False:", ALLOCATION),
    Mutant(
        "context keys are counted in the profile", SVOO, "ranked.cumsum(-1) - ranked <", "ranked.cumsum(-1) <", RULES
    ),
    Mutant("hidden keys are in the share", SVOO, "visible = int(is_visible.sum())", "pass", RULES),
    Mutant("the mass of the context does not count", SVOO, "(before + ranked", "(0 * before + ranked", RULES),
    Mutant("profiles map query heads to key heads by modulo", SVOO, "h // repeats", "h % k.shape[1]", RULES),
    Mutant("wide heads are lifted", SVOO, "is_wide = share > THRESHOLD", "is_wide = share < THRESHOLD", RULES),
    Mutant(
        "mean of the runs in place of the largest", SVOO, "max(low, *head)", "max(low, statistics.fmean(head))", RULES
    ),
    Mutant("a rule without a quantile", SVOO, "+ GAUSSIAN_QUANTILE * spread", "", RULES),
    Mutant(
        "errors over the mean head for each head", TRY, "wrong / given, wrong", "wrong / given.mean(), wrong", TRYING
    ),
    Mutant(
        "the sparse results go on",
        TRY,
        'exact.out, writer.state["statistics"], *found',
        'tried.out, writer.state["statistics"], *found',
        TRYING,
    ),
    Mutant(
        "candidates in place of everything", TRY, "_with_share(writer, EVERYTHING)", "_with_share(writer, 0.3)", TRYING
    ),
)
