"""Plausible one-line bugs. The tests must fail with each of them."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE_AND_CPU = ("tests/test_kernels_block_sparse_attention.py",)
CONTEXT = ("tests/test_kernels_context_attention.py",)
KMEANS = ("tests/test_kernels_kmeans.py",)
PERMUTE = ("tests/test_kernels_permute.py",)
RUNS = ("tests/test_kernels_work_list.py",)
SELECT = ("tests/test_kernels_select_blocks.py",)
SORT = ("tests/test_kernels_sort_labels.py",)
MATCH = ("tests/test_passes_match.py",)
TRACE = ("tests/test_passes_trace_axis.py",)
CLASSIFY = ("tests/test_passes_classify.py",)
REWRITE = ("tests/test_passes_rewrite.py",)
FUSE = ("tests/test_passes_fuse.py",)
CANONICALIZE = ("tests/test_passes_canonicalize.py",)
CONFIG = ("tests/test_passes_config.py",)
CHOICE = ("tests/test_kernels_choice.py",)
ASSIGN = ("tests/test_kernels_assign_gluon.py",)
TUNING = ("tests/test_kernels_tuning.py",)
AUTOTUNE = ("tests/test_kernels_autotune.py",)
LAUNCH_ATTENTION = ("tests/test_kernels_launch_attention.py",)
KERNEL_CONFIG = ("tests/test_kernel_config.py",)
RECALL = ("tests/test_kernels_recall.py",)
RECALL_TRITON = ("tests/test_kernels_recall_triton.py",)
GUARD = ("tests/test_guard.py",)
SELF_CHECK = ("tests/test_kernels_self_check.py",)
API = ("tests/test_clock.py", "tests/test_backend.py")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug: ``original`` occurs exactly once in ``file`` and becomes ``replacement``."""

    bug: str
    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]

    @property
    def room(self) -> str:
        """The first folder of ``file``."""
        return self.file.split("/")[0]


ATTENTION = "kernels/block_sparse_attention.py"
SELECTION = "kernels/select_blocks.py"
WORK_LIST = "kernels/work_list.py"
CLUSTERING = "kernels/kmeans.py"
MASKED = "kernels/masked_attention.py"
REWRITING = "passes/rewrite.py"
TRACING = "passes/trace_axis.py"
MATCHING = "passes/match.py"
READING = "passes/read_mask.py"
CLASSIFYING = "passes/classify.py"

MUTANTS = (
    Mutant(
        "last row of a query cluster is forgotten",
        ATTENTION,
        "return [(slice(*edge), keys) for edge",
        "return [(slice(edge[0], edge[1] - 1), keys) for edge",
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
        "flash_attention_for_cpu(q_parts, k_parts, v_parts, scale=scale)",
        "flash_attention_for_cpu(q_parts, k_parts, v_parts)",
        REFERENCE_AND_CPU,
    ),
    Mutant(
        "reference: scale forgotten",
        MASKED,
        "@ k.transpose(-1, -2) * scale",
        "@ k.transpose(-1, -2)",
        REFERENCE_AND_CPU + CONTEXT,
    ),
    Mutant(
        "cumulative mass includes the cluster itself",
        SELECTION,
        "before = torch.nn.functional.pad(probability.cumsum(-1)[..., :-1], (1, 0))",
        "before = probability.cumsum(-1)",
        SELECT,
    ),
    Mutant(
        "cluster sizes do not weigh the softmax",
        SELECTION,
        "(scores + k_sizes.log().unsqueeze(2)).masked_fill",
        "scores.masked_fill",
        SELECT,
    ),
    Mutant(
        "empty key clusters take part",
        SELECTION,
        ".masked_fill(k_sizes.unsqueeze(2) == 0, -math.inf)",
        "",
        SELECT,
    ),
    Mutant(
        "selection maps query heads to key heads by modulo",
        SELECTION,
        "return x.repeat_interleave(heads // x.shape[1], dim=1)",
        "return x.repeat(1, heads // x.shape[1], *[1] * (x.dim() - 2))",
        SELECT,
    ),
    Mutant(
        "floor of kept clusters forgotten",
        SELECTION,
        "kept[..., : math.floor(min_keep_ratio * k_sizes.shape[2])] = True",
        "pass",
        SELECT,
    ),
    Mutant(
        "floor of kept clusters rounded up",
        SELECTION,
        "math.floor(min_keep_ratio * k_sizes.shape[2])",
        "math.ceil(min_keep_ratio * k_sizes.shape[2])",
        SELECT,
    ),
    Mutant(
        "density not weighted by the query clusters",
        SELECTION,
        "q_share = q_sizes.to(dtype) / q_sizes.sum(-1, keepdim=True)",
        "q_share = torch.ones_like(mass) / q_sizes.shape[-1]",
        SELECT,
    ),
    Mutant(
        "farthest centroid instead of nearest",
        CLUSTERING,
        "tile, centroids.T, beta=-1).argmax(-1)\n        labels",
        "tile, centroids.T, beta=-1).argmin(-1)\n        labels",
        KMEANS,
    ),
    Mutant(
        "half of the squared norm forgotten",
        CLUSTERING,
        "    half_norms = centroids.square().sum(-1) / 2\n    sums",
        "    half_norms = centroids.new_zeros(clusters)\n    sums",
        KMEANS,
    ),
    Mutant(
        "whole squared norm instead of half",
        CLUSTERING,
        "    half_norms = centroids.square().sum(-1) / 2\n    sums",
        "    half_norms = centroids.square().sum(-1)\n    sums",
        KMEANS,
    ),
    Mutant(
        "empty cluster reset to zero",
        CLUSTERING,
        "sums / sizes.clamp(min=1), centroids)",
        "sums / sizes.clamp(min=1), torch.zeros_like(centroids))",
        KMEANS,
    ),
    Mutant("calls not counted", CLUSTERING, "calls.add_(1)", "calls.add_(0)", KMEANS),
    Mutant(
        "iteration counts of first and later calls swapped",
        CLUSTERING,
        "range(iters_step if starts is None else iters_init)",
        "range(iters_init if starts is None else iters_step)",
        KMEANS,
    ),
    Mutant(
        "chain goes to the farthest centroid",
        CLUSTERING,
        'masked_fill(~is_left, float("inf")).argmin()',
        'masked_fill(~is_left, float("-inf")).argmax()',
        KMEANS,
    ),
    Mutant(
        "chain applied on later calls too",
        CLUSTERING,
        "if starts is not None and remaining == 0",
        "if remaining == 0",
        KMEANS,
    ),
    Mutant(
        "chain visits centroids again", CLUSTERING, "is_left[order[-1]] = False", "is_left[order[-1]] = True", KMEANS
    ),
    Mutant(
        "chain after the first iteration", CLUSTERING, "and remaining == 0", "and remaining == iters_init - 1", KMEANS
    ),
    Mutant("seed ignored", CLUSTERING, "_mix32(seed * 0x9E3779B9 % 2**32 + head)", "_mix32(head)", KMEANS),
    Mutant(
        "order of tokens within a cluster reversed",
        "kernels/sort_labels.py",
        "order = labels.sort(dim=-1, stable=True).indices.int()",
        "order = (labels.shape[2] - 1 - labels.flip(-1).sort(dim=-1, stable=True).indices).int()",
        SORT,
    ),
    Mutant(
        "inverse order returned",
        "kernels/sort_labels.py",
        "labels.sort(dim=-1, stable=True).indices.int()",
        "labels.sort(dim=-1, stable=True).indices.argsort(-1).int()",
        SORT,
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
        "inverse permutation forgotten",
        REWRITING,
        "return self.emit(torch.ops.svg2.unpermute_tokens.default, self.emit(operator.getitem, attention, 0), q_order)",
        "return self.emit(operator.getitem, attention, 0)",
        REWRITE,
    ),
    Mutant(
        "output permuted again instead of back",
        REWRITING,
        "self.emit(torch.ops.svg2.unpermute_tokens.default, self",
        "self.emit(torch.ops.svg2.permute_tokens.default, self",
        REWRITE,
    ),
    Mutant(
        "queries put in the order of the keys",
        REWRITING,
        "self.emit(permute, q, q_order)",
        "self.emit(permute, q, k_order)",
        REWRITE,
    ),
    Mutant(
        "values left in their own order",
        REWRITING,
        "v_clustered = self.emit(permute, v, k_order)",
        "v_clustered = v",
        REWRITE,
    ),
    Mutant(
        "order of the joined output swapped",
        REWRITING,
        "self.join(token_major, 1)",
        "self.join(token_major[::-1], 1)",
        REWRITE,
    ),
    Mutant(
        "context mask cut from the first rows",
        REWRITING,
        "self.cut(self.mask, 3, *each) for each in context",
        "self.cut(self.mask, 3, 0, each[1] - each[0]) for each in context",
        REWRITE,
    ),
    Mutant(
        "context mask forgotten for the video rows",
        REWRITING,
        "2),\n            context_mask,\n",
        "2),\n            None,\n",
        REWRITE,
    ),
    Mutant(
        "mask forgotten for the context rows",
        REWRITING,
        "q, key, value, self.mask, self.scale)",
        "q, key, value, None, self.scale)",
        REWRITE,
    ),
    Mutant(
        "mask shared by the batch not expanded",
        REWRITING,
        "[self.site.batch, 1, 1, -1]",
        "[-1, 1, 1, -1]",
        REWRITE,
    ),
    Mutant(
        "scale forgotten in the rewrite",
        REWRITING,
        "return self.site.scale",
        "return self.site.head_dim**-0.5",
        REWRITE,
    ),
    Mutant(
        "hidden video keys beside context rows attended to",
        REWRITING,
        "self.cut(self.mask, 3, *video) if self.site.may_hide_video else None",
        "None",
        REWRITE,
    ),
    Mutant(
        "every mask thought to show the video",
        CLASSIFYING,
        "return not is_true(candidate.key_mask, candidate.node, (first, segment.length))",
        "return False",
        (*CLASSIFY, *REWRITE),
    ),
    Mutant(
        "rows of a mask looked for at its front only",
        READING,
        "if same_size(start, rows[0]) and same_size(shape[-1], rows[1]):",
        "if same_size(shape[-1], rows[1]):",
        CLASSIFY,
    ),
    Mutant(
        "padding on the other side of a mask taken for the video's",
        READING,
        "is_front = same_size(first, 0) and same_size(length, before)",
        "is_front = same_size(length, before) or same_size(length, after)",
        CLASSIFY,
    ),
    Mutant(
        "a sum of any numbers is a count",
        READING,
        "tensor is not None and not tensor.is_floating_point()",
        "tensor is not None",
        CLASSIFY,
    ),
    Mutant(
        "no room left for the cluster of hidden keys",
        CLASSIFYING,
        "min(k_clusters, MAX_CLUSTERS - 1)",
        "k_clusters",
        CLASSIFY,
    ),
    Mutant("state of two sites shared", REWRITING, "if index == site.index}", "}", REWRITE),
    Mutant(
        "rewritten attention not found as a later source",
        REWRITING,
        "        by_name[site.node] = replacement\n",
        "",
        REWRITE,
    ),
    Mutant(
        "centroids of the queries used for the keys",
        REWRITING,
        'self.cluster(k, "k", self.site.k_clusters,',
        'self.cluster(k, "q", self.site.q_clusters,',
        REWRITE,
    ),
    Mutant(
        "cross-attention rewritten",
        MATCHING,
        "if not same_size(query.shape[2], key.shape[2]):",
        "if False:",
        MATCH,
    ),
    Mutant("scale of the call ignored", MATCHING, "call.scale if call.scale is not None else 1.0", "1.0", MATCH),
    Mutant("causal flag ignored", MATCHING, "if call.is_causal is not False:", "if False:", MATCH),
    Mutant("dropout ignored", MATCHING, "or call.dropout_p != 0:", "or False:", MATCH),
    Mutant("mask ignored", MATCHING, "if call.attn_mask is not None and", "if False and", MATCH),
    Mutant(
        "any product of masks is an outer product",
        READING,
        "and other.args[0] is factor",
        "",
        MATCH,
    ),
    Mutant(
        "transpose along any axes makes an outer product",
        READING,
        "{int(str(axis)) % 4 for axis in other.args[1:3]} == {2, 3}",
        "True",
        MATCH,
    ),
    Mutant(
        "mask of another length taken for a key mask",
        MATCHING,
        "if key_mask is None or not _covers_keys(key_mask, key):",
        "if key_mask is None:",
        MATCH,
    ),
    Mutant(
        "foreign attentions take a number",
        MATCHING,
        "            found.append(_read_foreign(node, config.min_tokens))\n",
        "            found.append(_read_foreign(node, config.min_tokens))\n            ordinal += 1\n",
        MATCH,
    ),
    Mutant(
        "two symbolic sizes are always equal",
        "passes/nodes.py",
        "return str(a) == str(b)",
        "return True",
        TRACE + MATCH + REWRITE,
    ),
    Mutant(
        "two known sizes are always equal", "passes/nodes.py", "        return a == b\n", "        return True\n", MATCH
    ),
    Mutant(
        "axis not shifted by unbind",
        TRACING,
        "return at.to(whole, at.axis + (at.axis >= dim))",
        "return at.to(whole, at.axis)",
        TRACE,
    ),
    Mutant(
        "pieces of a cat reversed",
        TRACING,
        "for each, shape in pieces), joined=True)",
        "for each, shape in pieces[::-1]), joined=True)",
        TRACE,
    ),
    Mutant(
        "start of a split is always 0", TRACING, "for part in parts[:index]), 0)", "for part in parts[:0]), 0)", TRACE
    ),
    Mutant(
        "negative start of a slice taken as it is",
        TRACING,
        "start = shape[axis] + start",
        "start = start + 0",
        TRACE,
    ),
    Mutant(
        "attention followed to its values",
        TRACING,
        "return at.to(sdpa_arguments(at.node).query, at.axis)",
        "return at.to(sdpa_arguments(at.node).value, at.axis)",
        TRACE,
    ),
    Mutant("rows followed through a shuffle", TRACING, '("roll", "flip", "sort",', '("sort",', TRACE),
    Mutant("video is the shortest piece", CLASSIFYING, "video = max(range", "video = min(range", CLASSIFY),
    Mutant(
        "dense_layers off by one",
        CLASSIFYING,
        "if layers.index(result.layer) < config.dense_layers:",
        "if layers.index(result.layer) <= config.dense_layers:",
        CLASSIFY,
    ),
    Mutant(
        "dense_layers counts attentions instead of layers",
        CLASSIFYING,
        "            if result.layer not in layers:\n                layers.append",
        "            if True:\n                layers.append",
        CLASSIFY,
    ),
    Mutant(
        "share of context measured against the video",
        CLASSIFYING,
        "for each in segments)\n\n\ndef _site",
        "for each in segments if each.is_video)\n\n\ndef _site",
        CLASSIFY,
    ),
    Mutant(
        "cross-attention between equal lengths rewritten",
        CLASSIFYING,
        "if _different_streams(queries, origin):",
        "if False:",
        CLASSIFY,
    ),
    Mutant(
        "position tables taken for another stream",
        CLASSIFYING,
        " and not POSITIONS.search(piece.node.name)",
        "",
        CLASSIFY,
    ),
    Mutant(
        "operands made before a graph break taken for streams",
        CLASSIFYING,
        " and not is_operand",
        "",
        CLASSIFY,
    ),
    Mutant(
        "rows that ask another stream taken for its own",
        CLASSIFYING,
        "if any(_same_rows(queries, trace_axis(each.node, each.axis)) for each in witnesses):",
        "if witnesses:",
        CLASSIFY,
    ),
    Mutant(
        "keys not asked where positions lead astray",
        CLASSIFYING,
        "[piece, keys.pieces[position]] if _same_lengths(keys, values) else [piece]",
        "[piece]",
        CLASSIFY,
    ),
    Mutant(
        "rows asked outside a cut taken for context",
        CLASSIFYING,
        " or list(edges) != sorted(edges)",
        "",
        CLASSIFY,
    ),
    Mutant(
        "context rows get queries that were not asked",
        CLASSIFYING,
        "has_context_queries=same_size(candidate.sequence, candidate.keys),",
        "has_context_queries=True,",
        (*CLASSIFY, *REWRITE),
    ),
    Mutant(
        "hidden keys left in their clusters",
        REWRITING,
        "self.emit(aten.masked_fill.Scalar, labels, hidden, clusters)",
        "labels",
        REWRITE,
    ),
    Mutant(
        "mask of ones asked for although it was dropped",
        REWRITING,
        "key_mask_of(self.call.attn_mask) if site.has_mask else None",
        "None if self.call.attn_mask is None else key_mask_of(self.call.attn_mask)",
        REWRITE,
    ),
    Mutant(
        "overwritten ones taken for all true",
        READING,
        "return not any(is_written(each, each, end) for each in trail)",
        "return True",
        MATCH,
    ),
    Mutant(
        "kernels of other libraries known by their op alone",
        MATCHING,
        "return node.target._schema.name if isinstance(node.target, OpOverload) else target_name(node)",
        "return target_name(node)",
        MATCH,
    ),
    Mutant(
        "more clusters than tokens accepted",
        CLASSIFYING,
        "if max(q_clusters, k_clusters) > tokens:",
        "if q_clusters > tokens:",
        CLASSIFY,
    ),
    Mutant(
        "queries folded into the attention without their order",
        "passes/fuse.py",
        "= queries.args[0], order",
        "= queries.args[0], None",
        FUSE,
    ),
    Mutant(
        "folded though something else reads the permuted queries",
        "passes/fuse.py",
        "if not is_permuted or len(queries.users) > 1 or",
        "if not is_permuted or",
        FUSE,
    ),
    Mutant(
        "folded whatever order the result is put back in",
        "passes/fuse.py",
        " and queries.args[1] is order",
        "",
        FUSE,
    ),
    Mutant("the given graph is changed", "passes/sparsify.py", "work = clone(gm)", "work = gm", REWRITE),
    Mutant(
        "dense by design is an error too",
        "passes/sparsify.py",
        "if not rejection.by_design:",
        "if True:",
        REWRITE,
    ),
    Mutant(
        "state buffers are fake",
        "passes/attach_state.py",
        "gm.register_buffer(state_name(spec), torch.zeros(spec.shape, dtype=spec.dtype, device=site.device))",
        "gm.register_buffer(state_name(spec), _fake(spec, site.device, fake_mode))",
        REWRITE,
    ),
    Mutant(
        "signature of an exported module forgotten",
        "passes/clone.py",
        "    graph.set_codegen(gm.graph._codegen)\n",
        "",
        REWRITE,
    ),
    Mutant("shared state not noticed", "passes/verify.py", "if writers > 1:", "if writers > 2:", REWRITE),
    Mutant(
        "missing inverse permutation not noticed",
        "passes/verify.py",
        "if not len(sites) == gone == sparse == restored:",
        "if not len(sites) == gone == sparse:",
        REWRITE,
    ),
    Mutant(
        "mask dropped by canonicalize",
        "passes/canonicalize.py",
        '**({} if mask is None else {"attn_mask": mask}),',
        "",
        CANONICALIZE,
    ),
    Mutant(
        "scale dropped by canonicalize",
        "passes/canonicalize.py",
        "scale=plan.scale.number,",
        "scale=None,",
        CANONICALIZE,
    ),
    Mutant("top_p of 0 accepted", "passes/config.py", "or (exclusive_low and value == low)", "", CONFIG),
    Mutant(
        "more clusters than tokens chosen", "passes/config.py", "min(tokens, MAX_CLUSTERS,", "min(MAX_CLUSTERS,", CONFIG
    ),
    Mutant(
        "CFG streams mixed up",
        "svg2_compile/clock.py",
        "stream = (explicit and explicit.stream) or (says and says.stream) or str(ordinal)",
        'stream = "0"',
        API,
    ),
    Mutant(
        "new generation not noticed",
        "svg2_compile/clock.py",
        "turned = self._direction not in (0, direction)",
        "turned = False",
        API,
    ),
    Mutant(
        "new call of a pipeline is no new generation",
        "svg2_compile/clock.py",
        "begins = self._run == 0 or (call is not None and call != self._call)",
        "begins = self._run == 0",
        API,
    ),
    Mutant(
        "dense_steps off by one",
        "svg2_compile/schedule.py",
        "return now.step < dense_step_count",
        "return now.step <= dense_step_count",
        API,
    ),
    Mutant(
        "dense_layers off by one, layer by layer",
        "svg2_compile/schedule.py",
        "layer < config.dense_layers",
        "layer <= config.dense_layers",
        API,
    ),
    Mutant(
        "counters kept over generations",
        "svg2_compile/state.py",
        "self.tensors[name].zero_()",
        "pass",
        API,
    ),
    Mutant(
        "descriptors on a GPU without them",
        "kernels/launch.py",
        "too_old = _why_too_old(device, DESCRIPTOR_CAPABILITY)",
        "too_old = _why_too_old(device, MIN_CAPABILITY)",
        CHOICE,
    ),
    Mutant(
        "descriptors of rows that are no whole 16-byte units",
        "kernels/launch.py",
        "if dim % DESCRIPTOR_DIM_STEP or not",
        "if not",
        CHOICE,
    ),
    Mutant(
        "boxes of rows at any address",
        "kernels/launch.py",
        "if x.data_ptr() % 16 or any(",
        "if any(",
        ASSIGN,
    ),
    Mutant(
        "boxes of rows of any stride",
        "kernels/launch.py",
        "stride <= 0 or stride * x.element_size() % 16 for",
        "stride <= 0 for",
        ASSIGN,
    ),
    Mutant(
        "boxes of rows that are all the same one",
        "kernels/launch.py",
        "any(stride <= 0 or stride",
        "any(stride",
        ASSIGN,
    ),
    Mutant(
        "named attention not looked into",
        "kernels/launch.py",
        "    if reason is not None:\n        raise ValueError(",
        "    if reason is None:\n        raise ValueError(",
        CHOICE,
    ),
    Mutant(
        "the slowest attention that can run is chosen",
        "kernels/launch.py",
        "            chosen = name\n            break",
        "            chosen = name",
        CHOICE,
    ),
    Mutant(
        "rows of the attention not counted",
        "kernels/launch.py",
        "reason = why_not(device, dtype, dim=dim, rows=rows)",
        "reason = why_not(device, dtype, dim=dim, rows=1)",
        CHOICE,
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
        "if _is_capturing():",
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
        "tiles accepted for any attention",
        "passes/kernel_config.py",
        'if self.attention == "auto":',
        'if self.attention == "none":',
        KERNEL_CONFIG,
    ),
    Mutant(
        "warps that are no power of two", "passes/kernel_config.py", "and value & (value - 1) == 0", "", KERNEL_CONFIG
    ),
    Mutant(
        "autotuning not passed to the attention",
        "passes/rewrite.py",
        "self.tiles(), self.kernel_config.autotune]",
        "self.tiles(), False]",
        REWRITE,
    ),
    Mutant(
        "given tiles overridden by the tuned ones",
        "passes/rewrite.py",
        "given.get(name, getattr(tuned, name))",
        "getattr(tuned, name)",
        REWRITE,
    ),
    Mutant(
        "options of kernels taken for Inductor's",
        "svg2_compile/options.py",
        "FIELD_NAMES = (*config.FIELD_NAMES, *kernel_config.FIELD_NAMES)",
        "FIELD_NAMES = config.FIELD_NAMES",
        KERNEL_CONFIG,
    ),
    Mutant(
        "recall over the kept keys alone",
        "kernels/recall.py",
        "masses.append((scores.logsumexp(-1), ",
        "masses.append((scores.masked_fill(~kept, -torch.inf).logsumexp(-1), ",
        RECALL,
    ),
    Mutant(
        "recall counts hidden keys",
        "kernels/recall.py",
        'keys[part].to(dtype).mT * scale).masked_fill_(hidden[part], float("-inf"))',
        "keys[part].to(dtype).mT * scale)",
        RECALL,
    ),
    Mutant(
        "recall's kernel counts hidden keys",
        "kernels/recall_triton.py",
        "is_key = offs_n < visible",
        "is_key = offs_n < tokens",
        RECALL_TRITON,
    ),
    Mutant(
        "recall's kernel takes every key for kept",
        "kernels/recall_triton.py",
        "tl.where(kept > 0, weights, 0.0)",
        "weights",
        RECALL_TRITON,
    ),
    Mutant(
        "recall's kernel forgets to shrink the kept mass",
        "kernels/recall_triton.py",
        "mass = mass * shrink + ",
        "mass = mass + ",
        RECALL_TRITON,
    ),
    Mutant(
        "recall's kernel looks at every call",
        "kernels/recall_triton.py",
        "return (tl.load(calls_ptr) - 1) % interval == 0",
        "return (tl.load(calls_ptr) - 1) % interval >= 0",
        RECALL_TRITON,
    ),
    Mutant(
        "recall forgets the context keys that are kept",
        "kernels/recall.py",
        "total, mass = total.logaddexp(always), mass.logaddexp(always)",
        "total = total.logaddexp(always)",
        RECALL,
    ),
    Mutant(
        "recall of one row too far in the order of the clusters",
        "kernels/recall.py",
        "positions.expand(batch, heads, -1).contiguous(), right=True)",
        "positions.expand(batch, heads, -1).contiguous())",
        RECALL,
    ),
    Mutant(
        "recall looks at the same rows at every call",
        "kernels/recall.py",
        "phase = (calls.long() + seed) * GOLDEN_STEP",
        "phase = (calls.long() * 0 + seed) * GOLDEN_STEP",
        RECALL,
    ),
    Mutant(
        "guard takes a head that kept enough",
        "kernels/recall.py",
        "& (of_heads < min_recall)",
        "& (of_heads > min_recall)",
        RECALL,
    ),
    Mutant(
        "guard forgets when a head fell",
        "kernels/recall.py",
        "is_measured & (dense_heads[..., 0] == 0) & (",
        "is_measured & (",
        RECALL,
    ),
    Mutant(
        "guard lets a dense head keep its runs",
        "kernels/dense_heads.py",
        "return one_run.where(is_dense.unsqueeze(-1), runs), all_counts",
        "return runs, all_counts",
        GUARD,
    ),
    Mutant(
        "guard reports the density of the selection",
        "kernels/dense_heads.py",
        "statistics += dense_statistics.where(is_dense, call_statistics)",
        "statistics += call_statistics",
        GUARD,
    ),
    Mutant(
        "guard survives the generation",
        "svg2_compile/state.py",
        'OF_A_GENERATION = ("q_calls", "k_calls", "dense_heads")',
        'OF_A_GENERATION = ("q_calls", "k_calls")',
        GUARD,
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
        "self-check of one dtype condemns all",
        "kernels/launch.py",
        "    wrong_kernels[name, _with_index(device), dtype] = reason",
        "    wrong_kernels.update({(name, _with_index(device), each): reason for each in (dtype, torch.float16)})",
        SELF_CHECK,
    ),
    Mutant(
        "self-check while a CUDA graph records",
        "kernels/self_check.py",
        'kind.device.type != "cuda" or torch.cuda.is_current_stream_capturing()',
        'kind.device.type != "cuda"',
        SELF_CHECK,
    ),
    Mutant(
        "self-check after the first sparse call too",
        "svg2_compile/region.py",
        "        self._kinds = ()\n        self.sparse_calls",
        "        self.sparse_calls",
        SELF_CHECK,
    ),
)
