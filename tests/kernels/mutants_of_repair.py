"""Plausible one-line bugs of floors in keys, of rows that are computed densely, and of what they tell of others."""

from mutant import Mutant

PROBES = "kernels/probe_rows.py"
PROBES_KERNEL = "kernels/probe_rows_triton.py"
REPAIR = "kernels/repair_rows.py"
REPAIR_KERNEL = "kernels/repair_rows_triton.py"

PROBES_TESTS = ("tests/kernels/test_probe_rows.py",)
REPAIR_TESTS = ("tests/kernels/test_repair_rows.py",)
TRITON = ("tests/kernels/test_repair_rows_triton.py",)

SELECTION = "kernels/select_blocks.py"
SELECTION_KERNEL = "kernels/select_blocks_triton.py"
LEAST = "kernels/least_keys.py"
LEAST_TESTS = ("tests/kernels/test_least_keys.py",)
SELECT_TRITON = ("tests/kernels/test_select_blocks_triton.py",)

MUTANTS = (
    Mutant(
        "the floor lowers those above it",
        SELECTION,
        "budget = torch.maximum(budget, least_keys[..., None, None])",
        "budget = least_keys[..., None, None]",
        LEAST_TESTS,
    ),
    Mutant(
        "the floor is a sum over the clusters of the first key head",
        LEAST,
        "per_query_head(k_sizes.sum(-1, dtype=torch.int32), density.shape[1])",
        "k_sizes.sum(-1, dtype=torch.int32)[:, :1]",
        LEAST_TESTS,
    ),
    Mutant(
        "the floor is that of the last call alone",
        LEAST,
        "floors += torch.stack(",
        "floors[:] = torch.stack(",
        LEAST_TESTS,
    ),
    Mutant(
        "the floor is the mass that is kept",
        LEAST,
        'STATISTICS.index("density_sum")',
        'STATISTICS.index("kept_mass_sum")',
        LEAST_TESTS,
    ),
    Mutant(
        "kernel: the floor of the first head for all",
        SELECTION_KERNEL,
        "        least_ptr += head\n",
        "        least_ptr += 0\n",
        SELECT_TRITON,
    ),
    Mutant(
        "kernel: the floor lowers those above it",
        "kernels/selection_threshold.py",
        "keys = tl.maximum(keys, tl.load(least_ptr).to(tl.float32))",
        "keys = tl.load(least_ptr).to(tl.float32)",
        SELECT_TRITON,
    ),
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
