"""Plausible one-line bugs of the means that stand in for what is dropped, and of their weights."""

from mutant import Mutant

ATTENTION = "kernels/block_sparse_attention.py"
MEANS = "kernels/cluster_means.py"
DROPPED = "kernels/log_dropped_sizes.py"
PSEUDO_KEYS = "kernels/pseudo_keys_triton.py"
ERRORS = "kernels/block_errors.py"
ERRORS_KERNEL = "kernels/block_errors_triton.py"
SELECTION = "kernels/select_blocks.py"
SELECTION_SCRATCH = "kernels/selection_scratch.py"
SELECTION_THRESHOLD = "kernels/selection_threshold.py"

PSEUDO = ("tests/kernels/test_pseudo_keys.py",)
PSEUDO_TRITON = ("tests/kernels/test_pseudo_keys_triton.py",)
MEANS_TESTS = ("tests/kernels/test_cluster_means.py",)
DROPPED_TESTS = ("tests/kernels/test_log_dropped_sizes.py",)
TRITON = ("tests/kernels/test_cluster_means_triton.py",)
ERRORS_TESTS = ("tests/kernels/test_block_errors.py",)
ERRORS_TRITON = ("tests/kernels/test_block_errors_triton.py",)
WEIGHTS = "kernels/log_dropped_weights.py"
WEIGHTS_KERNEL = "kernels/log_dropped_weights_triton.py"
WEIGHTS_TESTS = ("tests/kernels/test_log_dropped_weights.py",)
WEIGHTS_TRITON = ("tests/kernels/test_log_dropped_weights_triton.py",)
ROUTE = ("tests/kernels/test_route_by_error.py",)
SELECT_TRITON = ("tests/kernels/test_select_blocks_triton.py",)

MUTANTS = (
    Mutant(
        "reference: pseudo-keys have the bias of another query cluster",
        ATTENTION,
        "biases = pseudo_bias[b, h, cluster]",
        "biases = pseudo_bias[b, h, cluster - 1]",
        PSEUDO,
    ),
    Mutant(
        "reference: pseudo-keys without a bias",
        ATTENTION,
        "return masked_attention(q, k, v, torch.cat((mask, biases > -math.inf), dim=-1), scale, bias)",
        "return masked_attention(q, k, v, torch.cat((mask, biases > -math.inf), dim=-1), scale)",
        PSEUDO,
    ),
    Mutant(
        "pseudo-keys before the context",
        ATTENTION,
        "kept = torch.cat((kept, before + pseudo_keys))",
        "kept = torch.cat((before + pseudo_keys, kept))",
        PSEUDO,
    ),
    Mutant(
        "pseudo-keys that are left out are read",
        ATTENTION,
        "pseudo_keys = (bias > -math.inf).nonzero()[:, 0]",
        "pseudo_keys = torch.arange(len(bias))",
        PSEUDO,
    ),
    Mutant(
        "query clusters that keep the same share the bias of the first",
        ATTENTION,
        "told_apart = torch.cat((told_apart, biases.view(torch.int32)), dim=-1)",
        "told_apart = told_apart",
        PSEUDO,
    ),
    Mutant(
        "bias of pseudo-keys forgotten on the CPU",
        ATTENTION,
        "attn_mask=added, scale=scale)",
        "attn_mask=None, scale=scale)",
        PSEUDO,
    ),
    Mutant(
        "pseudo-keys lost where queries are not in cluster order",
        ATTENTION,
        'block_sparse_attention_reference(*clustered, "auto", None, False, *pseudo)',
        "block_sparse_attention_reference(*clustered)",
        PSEUDO,
    ),
    Mutant(
        "sums instead of means",
        MEANS,
        "sums[:-1] / sizes[b, g].clamp(min=1).unsqueeze(-1)",
        "sums[:-1]",
        MEANS_TESTS,
    ),
    Mutant(
        "hidden tokens in the last mean",
        MEANS,
        "starts = torch.nn.functional.pad(ends, (1, 0))",
        "starts = torch.nn.functional.pad(ends[..., :-1], (1, 1), value=x.shape[2])",
        MEANS_TESTS,
    ),
    Mutant(
        "means in the dtype of the tokens added up",
        MEANS,
        "x[b, g].to(dtype), starts[b, g]",
        "x[b, g].bfloat16().to(dtype), starts[b, g]",
        MEANS_TESTS,
    ),
    Mutant(
        "runs past their number kept",
        DROPPED,
        "edges = torch.where(is_run.unsqueeze(-1), runs, ends[:, :, None, None, -1:])",
        "edges = runs",
        DROPPED_TESTS,
    ),
    Mutant(
        "a run begins at the empty cluster before it",
        DROPPED,
        "edges.flatten(2).contiguous(), right=True)",
        "edges.flatten(2).contiguous(), right=False)",
        DROPPED_TESTS,
    ),
    Mutant(
        "kept clusters weigh, dropped ones do not",
        DROPPED,
        ".masked_fill(is_kept, -math.inf)",
        ".masked_fill(~is_kept, -math.inf)",
        DROPPED_TESTS,
    ),
    Mutant(
        "weights of the first key head for all",
        DROPPED,
        "sizes = per_query_head(k_sizes, heads)",
        "sizes = per_query_head(k_sizes[:, :1].expand_as(k_sizes), heads)",
        DROPPED_TESTS,
    ),
    Mutant(
        "kernel: what was attended to before weighs nothing",
        PSEUDO_KEYS,
        'row_sum = tl.where(row_max == -float("inf"), 0.0, 1.0)',
        "row_sum = tl.zeros([BLOCK_M], tl.float32)",
        PSEUDO_TRITON,
    ),
    Mutant(
        "kernel: the log-sum-exp taken to base 2 as it is",
        PSEUDO_KEYS,
        'row_max = tl.load(lse_ptr + rows, mask=inside, other=-float("inf")) / LN_2',
        'row_max = tl.load(lse_ptr + rows, mask=inside, other=-float("inf"))',
        PSEUDO_TRITON,
    ),
    Mutant(
        "kernel: bias of the first query cluster for all",
        PSEUDO_KEYS,
        "bias_ptr += (bh * q_clusters + cluster) * pseudo",
        "bias_ptr += bh * q_clusters * pseudo",
        PSEUDO_TRITON,
    ),
    Mutant(
        "kernel: pseudo-keys of query heads",
        PSEUDO_KEYS,
        "first_key = bh // repeats * pseudo",
        "first_key = bh % (heads // repeats) * pseudo",
        PSEUDO_TRITON,
    ),
    Mutant(
        "kernel: the last tile of a cluster reaches into the next one",
        "kernels/cluster_means_triton.py",
        "first + offs_n < size, offs_d",
        "first + offs_n >= 0, offs_d",
        TRITON,
    ),
    Mutant(
        "kernel: the last key of a run is of the next cluster",
        "kernels/log_dropped_sizes_triton.py",
        "(starts[:, None] < last_key[None, :])",
        "(starts[:, None] <= last_key[None, :])",
        TRITON,
    ),
    Mutant(
        "the mean of a cluster makes no error of its own",
        ERRORS,
        "sums += k_sizes[b, g] * of_mean.square() * v_mean.square().sum(-1)",
        "sums += of_mean.square() * v_mean.square().sum(-1)",
        ERRORS_TESTS,
    ),
    Mutant(
        "errors of weights instead of errors of what they bring",
        ERRORS,
        "values.square().sum(-1)\n",
        "torch.ones_like(values[:, 0])\n",
        ERRORS_TESTS,
    ),
    Mutant(
        "errors beside the largest weight of their block are comparable",
        ERRORS,
        "LEAST_ERROR).log() + 2 * highest",
        "LEAST_ERROR).log() + highest",
        ERRORS_TESTS,
    ),
    Mutant(
        "hidden values count",
        ERRORS,
        ".masked_fill(hidden.unsqueeze(-1), 0)",
        "",
        ERRORS_TESTS,
    ),
    Mutant(
        "kernel: weights before a larger one keep their square",
        ERRORS_KERNEL,
        "squares = squares * decay * decay +",
        "squares = squares * decay +",
        ERRORS_TRITON,
    ),
    Mutant(
        "kernel: the weight of the mean is not beside the largest",
        ERRORS_KERNEL,
        "mean_weight = tl.exp2(of_mean - highest)",
        "mean_weight = tl.exp2(of_mean)",
        ERRORS_TRITON,
    ),
    Mutant(
        "kernel: values of the next cluster in the last tile",
        ERRORS_KERNEL,
        'tl.where(valid[None, :], scores_of(q, k) * scale_log2, -float("inf"))',
        "scores_of(q, k) * scale_log2",
        ERRORS_TRITON,
    ),
    Mutant(
        "errors of whole clusters compared, whatever they cost",
        SELECTION,
        "(errors - sizes.clamp(min=1).log())",
        "errors",
        ROUTE,
    ),
    Mutant(
        "weights beside nothing in place of the mean",
        WEIGHTS,
        "(highest[:, :-1] - of_means)",
        "highest[:, :-1]",
        WEIGHTS_TESTS,
    ),
    Mutant(
        "weights of clusters that are kept",
        WEIGHTS,
        "is_empty | (log_sizes == -math.inf)",
        "is_empty",
        WEIGHTS_TESTS,
    ),
    Mutant(
        "hidden keys weigh in the last cluster",
        WEIGHTS,
        "torch.searchsorted(ends[b, g].long(), position, right=True)))",
        "torch.searchsorted(ends[b, g].long(), position, right=True).clamp(max=k_clusters - 1)))",
        WEIGHTS_TESTS,
    ),
    Mutant(
        "kernel: the weight of the mean is not scaled",
        WEIGHTS_KERNEL,
        "k_mean.to(tl.float32)[None, :], 1) * scale_log2",
        "k_mean.to(tl.float32)[None, :], 1)",
        WEIGHTS_TRITON,
    ),
    Mutant(
        "kernel: keys of a cluster that is kept are not stepped over",
        WEIGHTS_KERNEL,
        "        first_key += size\n",
        "        first_key += tl.where(tl.max(is_dropped.to(tl.int32), 0) > 0, size, 0)\n",
        WEIGHTS_TRITON,
    ),
    Mutant(
        "kernel: keys of the next cluster in the last tile",
        WEIGHTS_KERNEL,
        "valid = first + offs_n < size",
        "valid = first + offs_n < size + 1",
        WEIGHTS_TRITON,
    ),
    Mutant(
        "errors keep one cluster more than there is room for",
        SELECTION,
        "taken = ranked.cumsum(-1) - ranked < budget",
        "taken = ranked.cumsum(-1) - 2 * ranked < budget",
        ROUTE,
    ),
    Mutant(
        "nothing is kept for its mass",
        SELECTION,
        ".masked_fill(likeliest, math.inf)",
        "",
        ROUTE,
    ),
    Mutant(
        "the whole floor goes by mass",
        SELECTION,
        "guaranteed = max(1, math.floor(min_keep_ratio * logits.shape[3] / 2))",
        "guaranteed = max(1, math.floor(min_keep_ratio * logits.shape[3]))",
        ROUTE,
    ),
    Mutant(
        "mass of what the masses would have kept",
        SELECTION,
        "mass = (logits.softmax(-1) * keep).sum(-1)",
        "mass = mass",
        ROUTE,
    ),
    Mutant(
        "kernel: as many keys are not enough",
        SELECTION_THRESHOLD,
        "return keys - 0.5",
        "return keys",
        SELECT_TRITON,
    ),
    Mutant(
        "kernel: errors of whole clusters compared",
        SELECTION_SCRATCH,
        "logs = errors * LOG2_E - tl.log2(tl.maximum(sizes, 1).to(tl.float32))[None, :]",
        "logs = errors * LOG2_E",
        SELECT_TRITON,
    ),
    Mutant(
        "kernel: the likeliest are not kept in any case",
        SELECTION_THRESHOLD,
        "highest[None, :, None], errors)",
        "errors, errors)",
        SELECT_TRITON,
    ),
    Mutant(
        "kernel: masses of what the masses would have kept",
        SELECTION_THRESHOLD,
        "mass, _ = _mass_and_count(errors > low[None, :, None], weights)",
        "mass, _ = _mass_and_count(logits > low[None, :, None], weights)",
        SELECT_TRITON,
    ),
)
