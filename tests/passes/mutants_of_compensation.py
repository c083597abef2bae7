"""Plausible one-line bugs of the stages that compensate for what is dropped."""

from mutant import Mutant

COMPENSATE = ("tests/api/test_compensate.py",)

MUTANTS = (
    Mutant(
        "compensation that nobody asked for",
        "passes/plan.py",
        'if config.compensate != "none":\n        stages.append(Compensate(',
        'if config.compensate == "none":\n        stages.append(Compensate(',
        COMPENSATE,
    ),
    Mutant(
        "pseudo-keys not given to the attention",
        "passes/stages/attend.py",
        "pseudo = [None] * 3 if flow.pseudo_bias is None",
        "pseudo = [None] * 3 if flow.pseudo_bias is not None",
        COMPENSATE,
    ),
    Mutant(
        "means of the keys for the values",
        "passes/stages/average_clusters.py",
        "for x in (flow.k_clustered, flow.v_clustered))",
        "for x in (flow.k_clustered, flow.k_clustered))",
        COMPENSATE,
    ),
    Mutant(
        "means of tokens that are not in cluster order",
        "passes/stages/average_clusters.py",
        "(writer.emit(average, x, flow.k_sizes) for x in",
        "(writer.emit(average, x, flow.k_sizes) for x in (flow.k, flow.v) or",
        COMPENSATE,
    ),
    Mutant(
        "routing by errors that nobody asked for",
        "passes/plan.py",
        'config.route == "error"',
        'config.compensate == "centroids"',
        COMPENSATE,
    ),
    Mutant(
        "errors taken for masses",
        "passes/stages/keep_top_p.py",
        "given = flow.masses, flow.errors, flow.least_keys, writer",
        "given = flow.errors, flow.masses, flow.least_keys, writer",
        COMPENSATE,
    ),
    Mutant(
        "errors without means accepted",
        "passes/config.py",
        'if self.route == "error" and self.compensate == "none":',
        'if self.route == "error" and self.compensate is None:',
        ("tests/passes/test_config.py",),
    ),
)
