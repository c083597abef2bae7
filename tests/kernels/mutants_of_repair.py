"""Plausible one-line bugs of the rows that are computed densely, and of what they tell of the others."""

from mutant import Mutant

PROBES = "kernels/probe_rows.py"
PROBES_KERNEL = "kernels/probe_rows_triton.py"
REPAIR = "kernels/repair_rows.py"
REPAIR_KERNEL = "kernels/repair_rows_triton.py"

PROBES_TESTS = ("tests/kernels/test_probe_rows.py",)
REPAIR_TESTS = ("tests/kernels/test_repair_rows.py",)
TRITON = ("tests/kernels/test_repair_rows_triton.py",)

MUTANTS = (
    Mutant(
        "dense rows without the context",
        PROBES,
        "if context_k is not None and context_v is not None:\n            scores",
        "if context_k is None and context_v is not None:\n            scores",
        PROBES_TESTS,
    ),
    Mutant(
        "dense rows see hidden values of the context",
        PROBES,
        "values = values.masked_fill(hidden.mT, 0)",
        "values = values",
        PROBES_TESTS,
    ),
    Mutant(
        "dense rows see hidden values",
        PROBES,
        "values[part].to(dtype).masked_fill(hidden[part].mT, 0)",
        "values[part].to(dtype)",
        PROBES_TESTS,
    ),
    Mutant(
        "dense rows attend to what is kept",
        PROBES,
        "total = scores.logsumexp(-1)\n",
        "total = scores.masked_fill_(~kept, float('-inf')).logsumexp(-1)\n",
        PROBES_TESTS,
    ),
    Mutant(
        "recall of dense rows measured at every call",
        PROBES,
        "recall.where((k_calls - 1) % interval == 0, 0)",
        "recall.where((k_calls - 1) % interval >= 0, 0)",
        PROBES_TESTS,
    ),
    Mutant(
        "kernel: dense rows see hidden keys",
        PROBES_KERNEL,
        "is_key = offs_n < visible",
        "is_key = offs_n < tokens",
        TRITON,
    ),
    Mutant(
        "kernel: what dense rows have of earlier keys does not shrink",
        PROBES_KERNEL,
        "result * shrink[:, None], input_precision",
        "result, input_precision",
        TRITON,
    ),
    Mutant(
        "kernel: stretches of keys weigh alike",
        PROBES_KERNEL,
        "exact = (shares.unsqueeze(-1) * results).sum(1)",
        "exact = results.sum(1)",
        TRITON,
    ),
    Mutant(
        "kernel: recall of dense rows looks at every call",
        PROBES_KERNEL,
        "looked_at = tl.where((tl.load(calls_ptr) - 1) % interval == 0, rows, 0)",
        "looked_at = rows",
        TRITON,
    ),
    Mutant(
        "channels are not standardised",
        REPAIR,
        "x, y = (sparse - mean) / spread, residual - mean_residual",
        "x, y = sparse - mean, residual - mean_residual",
        REPAIR_TESTS,
    ),
    Mutant(
        "no ridge",
        REPAIR,
        "RIDGE * _identity(x) + dim / rows",
        "1e-6 * _identity(x) + dim / rows",
        REPAIR_TESTS,
    ),
    Mutant(
        "what is left is that of rows that were fitted",
        REPAIR,
        "coefficients @ directions / diagonal + (y",
        "coefficients @ directions + (y",
        REPAIR_TESTS,
    ),
    Mutant(
        "what is left forgets that the mean is of the row too",
        REPAIR,
        " - 1 / (RIDGE + dim) / rows)",
        ")",
        REPAIR_TESTS,
    ),
    Mutant(
        "heads are repaired whatever is left",
        REPAIR,
        "is_repaired = fit.error_left < fit.error",
        "is_repaired = fit.error_left == fit.error_left",
        REPAIR_TESTS,
    ),
    Mutant(
        "rows of the fit are foretold like the others",
        REPAIR,
        "    out.scatter_(2, index, exact.to(out.dtype))\n",
        "",
        REPAIR_TESTS,
    ),
    Mutant(
        "the mean of what is lacking is forgotten",
        REPAIR,
        "@ self.features @ self.directions + self.mean_residual",
        "@ self.features @ self.directions",
        REPAIR_TESTS,
    ),
    Mutant(
        "directions of rounding count",
        REPAIR,
        "column = torch.where(is_new, columns[:, :, place] / norm, 0)",
        "column = columns[:, :, place] / norm",
        REPAIR_TESTS,
    ),
    Mutant(
        "one power finds directions that are not the largest",
        REPAIR,
        "basis = orthonormal(gram @ basis)",
        "basis = orthonormal(basis)",
        REPAIR_TESTS,
    ),
    Mutant(
        "kernel: the inverse keeps the sign of sweeps",
        REPAIR_KERNEL,
        "return -matrix",
        "return matrix",
        TRITON,
    ),
    Mutant(
        "kernel: rows past the last one count",
        REPAIR_KERNEL,
        "y = tl.where(mask, residual - mean_residual[None, :], 0.0)",
        "y = residual - mean_residual[None, :]",
        TRITON,
    ),
    Mutant(
        "kernel: a head that is left alone is repaired",
        REPAIR_KERNEL,
        "if tl.load(found_ptr + head * REPAIRS_COLUMNS + 1) > 0.0:",
        "if tl.load(found_ptr + head * REPAIRS_COLUMNS) > 0.0:",
        TRITON,
    ),
    Mutant(
        "kernel: tiles of a program but the first are left out",
        REPAIR_KERNEL,
        "first_token = tl.program_id(0) * (TILES * BLOCK_N)",
        "first_token = tl.program_id(0) * BLOCK_N",
        TRITON,
    ),
)
