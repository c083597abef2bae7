"""Plausible one-line bugs of attention over the kept blocks, and of the lists of work it follows."""

from mutant import Mutant

ATTENTION = "kernels/block_sparse_attention.py"
WORK_LIST = "kernels/work_list.py"
MASKED = "kernels/masked_attention.py"

REFERENCE_AND_CPU = ("tests/kernels/test_block_sparse_attention.py",)
CONTEXT = ("tests/kernels/test_context_attention.py",)
PERMUTE = ("tests/kernels/test_permute.py",)
RUNS = ("tests/kernels/test_work_list.py",)
LAUNCH_ATTENTION = ("tests/kernels/test_launch_attention.py",)

MUTANTS = (
    Mutant(
        "last row of a query cluster is forgotten",
        ATTENTION,
        "return [(slice(*edge), keys, bias) for edge",
        "return [(slice(edge[0], edge[1] - 1), keys, bias) for edge",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "results left in the order of the clusters",
        ATTENTION,
        "return (out, lse) if q_order is None else _in_token_order(out, lse, q_order)",
        "return out, lse",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "log-sum-exp put back by the inverse order",
        ATTENTION,
        "torch.empty_like(lse).scatter_(2, q_order.long(), lse)",
        "lse.gather(2, q_order.long())",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "keys shifted by one at the edge of a kept cluster",
        ATTENTION,
        "(starts.flatten() - before).repeat_interleave(lengths)",
        "(starts.flatten() - before + 1).repeat_interleave(lengths)",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "reference: token at a cluster edge counted to the cluster before",
        ATTENTION,
        "token, right=True)",
        "token, right=False)",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "query heads mapped to key heads by modulo",
        ATTENTION,
        "g = h // repeats",
        "g = h % k.shape[1]",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "runs past their number attended to",
        ATTENTION,
        "ranges = (runs * is_run.unsqueeze(-1))[q_sizes > 0].long()",
        "ranges = runs[q_sizes > 0].long()",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "context keys dropped",
        ATTENTION,
        "kept = torch.cat((kept, context))",
        "kept = torch.cat((kept, context[:0]))",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "context mask inverted",
        ATTENTION,
        "else context_mask[b % context_mask.shape[0], 0, 0]",
        "else ~context_mask[b % context_mask.shape[0], 0, 0]",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "context mask of the first batch element used for all",
        ATTENTION,
        "context_mask[b % context_mask.shape[0], 0, 0]",
        "context_mask[0, 0, 0]",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "reference: context mask inverted",
        ATTENTION,
        "if context_mask is None else context_mask\n        mask",
        "if context_mask is None else ~context_mask\n        mask",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "scale forgotten in the attention",
        ATTENTION,
        "flash_attention_for_cpu(q_parts, k_parts, v_parts, attn_mask=added, scale=scale)",
        "flash_attention_for_cpu(q_parts, k_parts, v_parts, attn_mask=added)",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "reference: runs past their number attended to",
        WORK_LIST,
        "torch.where(is_run, edge, k_tokens).long()",
        "edge.clamp(0, k_tokens).long()",
        REFERENCE_AND_CPU + RUNS,
    ),
    Mutant(
        "empty clusters break runs",
        WORK_LIST,
        "keep & (sizes > 0), ~keep & (sizes > 0)",
        "keep & (sizes > 0), ~keep",
        RUNS,
    ),
    Mutant(
        "runs of key heads mapped to query heads by modulo",
        WORK_LIST,
        "k_sizes.repeat_interleave(heads // k_sizes.shape[1], dim=1)",
        "k_sizes.repeat(1, heads // k_sizes.shape[1], 1)",
        REFERENCE_AND_CPU + RUNS,
    ),
    Mutant(
        "short runs before long ones",
        WORK_LIST,
        "rank.sort(dim=-1, stable=True)",
        "rank.sort(dim=-1, stable=True, descending=True)",
        RUNS,
    ),
    Mutant(
        "runs have no room for every selection", WORK_LIST, "return (clusters + 1) // 2", "return clusters // 2", RUNS
    ),
    Mutant(
        "reference: key heads mapped to query heads by modulo",
        MASKED,
        "x.repeat_interleave(repeats, dim=1)",
        "x.repeat(1, repeats, 1, 1)",
        REFERENCE_AND_CPU + CONTEXT,
    ),
    Mutant(
        "reference: scale forgotten",
        MASKED,
        "@ k.transpose(-1, -2) * scale",
        "@ k.transpose(-1, -2)",
        REFERENCE_AND_CPU + CONTEXT,
    ),
    Mutant(
        "unpermute gathers instead of scatters",
        "kernels/permute.py",
        "y[_rows(order)] = x\n",
        "y[:] = x[_rows(order)]\n",
        PERMUTE,
    ),
    Mutant(
        "context rows ignore the mask",
        "kernels/context_attention.py",
        "q, k, v, attn_mask=key_mask, scale=scale",
        "q, k, v, attn_mask=None, scale=scale",
        CONTEXT,
    ),
    Mutant(
        "context rows ignore the scale",
        "kernels/context_attention.py",
        "attn_mask=key_mask, scale=scale",
        "attn_mask=key_mask",
        CONTEXT,
    ),
    Mutant(
        "given tiles timed against others",
        "kernels/launch_attention.py",
        "    if tiles is not None:",
        "    if tiles is not None and not autotune:",
        LAUNCH_ATTENTION,
    ),
    Mutant(
        "context not part of the kind that is timed",
        "kernels/launch_attention.py",
        "arguments[CONTEXT_K] is not None)",
        "False)",
        LAUNCH_ATTENTION,
    ),
    Mutant(
        "a negative scale left to the kernels",
        "kernels/attention_call.py",
        "        if scale < 0:\n",
        "        if False:\n",
        ("tests/kernels/test_attention_call.py",),
    ),
    Mutant(
        "a scale of zero left to the kernels",
        "kernels/attention_call.py",
        "        elif scale == 0:\n",
        "        elif False:\n",
        ("tests/kernels/test_attention_call.py",),
    ),
    Mutant(
        "a mask of one batch entry strided",
        "kernels/attention_call.py",
        "0 if mask is None or mask.shape[0] == 1 else",
        "0 if mask is None else",
        ("tests/kernels/test_attention_call.py",),
    ),
    Mutant(
        "an empty context told to the kernels",
        "kernels/attention_call.py",
        "if context > 0 and context_k is not None",
        "if context_k is not None",
        ("tests/kernels/test_attention_call.py",),
    ),
    Mutant(
        "nothing computed with a grid of nothing",
        "kernels/attention_call.py",
        "return self.out.numel() == 0",
        "return False",
        ("tests/kernels/test_attention_call.py",),
    ),
)
