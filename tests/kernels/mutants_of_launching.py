"""Plausible one-line bugs of choosing, tuning and checking kernels."""

from mutant import Mutant

CHOICE = ("tests/kernels/test_choice.py",)
ASSIGN = ("tests/kernels/test_assign_gluon.py",)
TUNING = ("tests/kernels/test_tuning.py",)
AUTOTUNE = ("tests/kernels/test_autotune.py",)
SELF_CHECK = ("tests/kernels/test_self_check.py",)

MUTANTS = (
    Mutant(
        "descriptors on a GPU without them",
        "kernels/why_not.py",
        "too_old = _why_too_old(device, DESCRIPTOR_CAPABILITY)",
        "too_old = _why_too_old(device, MIN_CAPABILITY)",
        CHOICE,
    ),
    Mutant(
        "descriptors of rows that are no whole 16-byte units",
        "kernels/why_not.py",
        "if dim % DESCRIPTOR_DIM_STEP or not",
        "if not",
        CHOICE,
    ),
    Mutant(
        "boxes of rows at any address",
        "kernels/why_not.py",
        "if x.data_ptr() % 16 or any(",
        "if any(",
        ASSIGN,
    ),
    Mutant(
        "boxes of rows of any stride",
        "kernels/why_not.py",
        "stride <= 0 or stride * x.element_size() % 16 for",
        "stride <= 0 for",
        ASSIGN,
    ),
    Mutant(
        "boxes of rows that are all the same one",
        "kernels/why_not.py",
        "any(stride <= 0 or stride",
        "any(stride",
        ASSIGN,
    ),
    Mutant(
        "named attention not looked into",
        "kernels/why_not.py",
        "    if reason is not None:\n        raise ValueError(",
        "    if reason is None:\n        raise ValueError(",
        CHOICE,
    ),
    Mutant(
        "the slowest attention that can run is chosen",
        "kernels/why_not.py",
        "            chosen = name\n            break",
        "            chosen = name",
        CHOICE,
    ),
    Mutant(
        "the attention is blamed for wrong pseudo-keys",
        "kernels/self_check.py",
        "return name if alone == kind or why_wrong(op, alone) is not None else PSEUDO_KEYS",
        "return name",
        SELF_CHECK,
    ),
    Mutant(
        "a wrong kernel for pseudo-keys runs on",
        "kernels/block_sparse_attention.py",
        "has_pseudo_keys = pseudo_k is not None",
        "has_pseudo_keys = False",
        SELF_CHECK,
    ),
    Mutant(
        "self-check of a clustering without its metric",
        "kernels/self_check.py",
        "metric = (seen.to(kind.device),)",
        "metric = ()",
        SELF_CHECK,
    ),
    Mutant(
        "rows of the attention not counted",
        "kernels/why_not.py",
        "reason = why_not(device, dtype, dim=dim, rows=rows)",
        "reason = why_not(device, dtype, dim=dim, rows=1)",
        CHOICE,
    ),
    Mutant(
        "self-check of one dtype condemns all",
        "kernels/why_not.py",
        "    wrong_kernels[name, _with_index(device), dtype] = reason",
        "    wrong_kernels.update({(name, _with_index(device), each): reason for each in (dtype, torch.float16)})",
        SELF_CHECK,
    ),
    Mutant(
        "tuned tiles of the neighbouring generation",
        "kernels/tuned/__init__.py",
        "    100: sm_100.ATTENTION,",
        "    100: sm_89.ATTENTION,",
        TUNING,
    ),
    Mutant(
        "tiles of the pointer attention for descriptors",
        "kernels/tuning.py",
        ".get((implementation, block_d), safe)",
        '.get(("pointer", block_d), safe)',
        TUNING,
    ),
    Mutant(
        "tiles in use are not among the candidates",
        "kernels/tuning.py",
        "dict.fromkeys((chosen, *others))",
        "dict.fromkeys(others or (chosen,))",
        TUNING,
    ),
    Mutant(
        "warps and stages of a user's tiles mixed up",
        "kernels/tuning.py",
        "AttentionTiles(block_m, block_n, PIECE, num_warps, num_stages)",
        "AttentionTiles(block_m, block_n, PIECE, num_stages, num_warps)",
        TUNING,
    ),
    Mutant("the slowest candidate kept", "kernels/autotune.py", "best = min(times", "best = max(times", AUTOTUNE),
    Mutant(
        "candidates timed while a CUDA graph records",
        "kernels/autotune.py",
        "if is_capturing():",
        "if False:",
        AUTOTUNE,
    ),
    Mutant("candidates timed at every call", "kernels/autotune.py", "if known is not None:", "if False:", AUTOTUNE),
    Mutant(
        "candidates timed by two threads at once",
        "kernels/autotune.py",
        "        if key not in _fastest:\n",
        "        if True:\n",
        AUTOTUNE,
    ),
    Mutant(
        "candidates timed with their compilation",
        "kernels/autotune.py",
        "    launch()\n    times = []",
        "    times = []",
        AUTOTUNE,
    ),
    Mutant(
        "mean of the timed launches",
        "kernels/autotune.py",
        "statistics.median(times)",
        "statistics.mean(times)",
        AUTOTUNE,
    ),
    Mutant(
        "self-check accepts what is not a number",
        "kernels/self_check.py",
        "return None if bool(error <= allowed)",
        "return None if not bool(error > allowed)",
        SELF_CHECK,
    ),
    Mutant(
        "self-check made at every call",
        "kernels/self_check.py",
        "                    _checked.add(key)\n",
        "                    break\n",
        SELF_CHECK,
    ),
    Mutant(
        "self-check while a CUDA graph records",
        "kernels/self_check.py",
        'kind.device.type != "cuda" or torch.cuda.is_current_stream_capturing()',
        'kind.device.type != "cuda"',
        SELF_CHECK,
    ),
)
