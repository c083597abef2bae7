"""Plausible one-line bugs of the stages that repair rows, and of those that set floors."""

from mutant import Mutant

REPAIR = ("tests/api/test_repair.py",)

FLOOR = ("tests/api/test_head_floor.py",)

MUTANTS = (
    Mutant(
        "a floor that nobody asked for",
        "passes/plan.py",
        'if config.head_floor == "online":',
        'if config.head_floor != "online":',
        FLOOR,
    ),
    Mutant(
        "the floor of what errors choose",
        "passes/stages/floor_heads.py",
        "write_selection(writer, replace(flow, errors=None), statistics)",
        "write_selection(writer, flow, statistics)",
        FLOOR,
    ),
    Mutant(
        "the selection for the floor counts as one",
        "passes/stages/floor_heads.py",
        'statistics = writer.emit(torch.ops.aten.zeros_like.default, writer.state["statistics"])',
        'statistics = writer.state["statistics"]',
        FLOOR,
    ),
    Mutant(
        "a floor that the selection does not get",
        "passes/stages/keep_top_p.py",
        "flow.errors, flow.least_keys, writer",
        "flow.errors, None, writer",
        FLOOR,
    ),
    Mutant(
        "repair that nobody asked for",
        "passes/plan.py",
        "if config.repair_rows:\n        stages.append(RepairRows())",
        "if config.measured_rows:\n        stages.append(RepairRows())",
        REPAIR,
    ),
    Mutant(
        "recall measured again beside the dense rows",
        "passes/stages/measure_recall.py",
        "self._measured(writer, flow) if flow.recall is None else flow.recall",
        "self._measured(writer, flow)",
        REPAIR,
    ),
    Mutant(
        "recall of dense rows never measured",
        "passes/stages/probe_rows.py",
        "site.recall_interval if self.measures else 0",
        "0",
        REPAIR,
    ),
    Mutant(
        "dense rows of values that are not in cluster order",
        "passes/stages/probe_rows.py",
        "            flow.v_clustered,\n",
        "            flow.v,\n",
        REPAIR,
    ),
    Mutant(
        "what repairs found is not added up",
        "passes/stages/repair_rows.py",
        'writer.emit(torch.ops.aten.add_.Tensor, writer.state["repairs"], found)',
        'writer.emit(torch.ops.aten.copy_.default, writer.state["repairs"], found)',
        REPAIR,
    ),
    Mutant(
        "more rows than a kernel holds accepted",
        "passes/config.py",
        'check_integer("repair_rows", self.repair_rows, 0, MAX_PROBES,',
        'check_integer("repair_rows", self.repair_rows, 0, None,',
        ("tests/passes/test_config.py",),
    ),
)
