"""Plausible one-line bugs of the API room."""

from mutant import Mutant

ENGINES = ("tests/api/test_tensorrt_engines.py",)
KERNEL_CONFIG = ("tests/passes/test_kernel_config.py",)
GUARD = ("tests/api/test_guard.py",)
SELF_CHECK = ("tests/kernels/test_self_check.py",)
VOUCHING = ("tests/api/test_backend.py",)
RECOMPILATION = ("tests/api/test_recompilation.py",)
API = ("tests/api/test_clock.py", "tests/api/test_backend.py")

MUTANTS = (
    Mutant(
        "a damaged engine is taken",
        "svg2_compile/tensorrt/engine_files.py",
        "elif hashlib.sha256(body).hexdigest().encode() != digest:",
        "elif False:",
        ("tests/api/test_engine_files.py",),
    ),
    Mutant(
        "an engine of another graph is taken",
        "svg2_compile/tensorrt/engine_files.py",
        'known["key"] == key and ',
        "",
        ("tests/api/test_engine_files.py",),
    ),
    Mutant(
        "indices are left out of an engine's name",
        "svg2_compile/tensorrt/engines.py",
        " or not constant.is_floating_point()",
        "",
        ENGINES,
    ),
    Mutant(
        "an engine with another layer's weights is taken as it is",
        "svg2_compile/tensorrt/engines.py",
        "if found.weights == weights:",
        "if found.weights:",
        ENGINES,
    ),
    Mutant(
        "weights written in place go unnoticed",
        "svg2_compile/tensorrt/lowering.py",
        "(id(each), each.data_ptr(), version_of(each))",
        "(id(each), each.data_ptr(), 0)",
        ("tests/api/test_tensorrt_lowering.py",),
    ),
    Mutant(
        "dense attention enters an engine",
        "svg2_compile/tensorrt/lowering.py",
        "    hold_attention(held)\n",
        "",
        ("tests/api/test_tensorrt_lowering.py",),
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
        "                spec.restart(self.tensors[spec.name])",
        "                pass",
        API,
    ),
    Mutant(
        "guard survives the generation",
        "passes/stages/guard_heads.py",
        'torch.float32, "generation")',
        "torch.float32)",
        GUARD,
    ),
    Mutant(
        "state vouched for in the next generation",
        "svg2_compile/state.py",
        "        self.is_clustered = False\n",
        "",
        VOUCHING,
    ),
    Mutant(
        "options of kernels taken for Inductor's",
        "svg2_compile/options.py",
        "FIELD_NAMES = (*config.FIELD_NAMES, *kernel_config.FIELD_NAMES)",
        "FIELD_NAMES = config.FIELD_NAMES",
        KERNEL_CONFIG,
    ),
    Mutant(
        "self-check after the first sparse call too",
        "svg2_compile/region.py",
        "        self._kinds = ()\n        self.sparse_calls",
        "        self.sparse_calls",
        SELF_CHECK,
    ),
    Mutant(
        "state vouched for that was only recorded",
        "svg2_compile/region.py",
        "        if not is_capturing():\n",
        "        if True:\n",
        VOUCHING,
    ),
    Mutant(
        "state vouched for before it has clustered",
        "svg2_compile/region.py",
        "for state in states if state.is_clustered for",
        "for state in states for",
        VOUCHING,
    ),
    Mutant(
        "the bytes of the ops' files are not in the name of what is compiled",
        "svg2_compile/cache_identity.py",
        "digest.update(content)",
        "pass",
        ("tests/api/test_cache_identity.py",),
    ),
    Mutant(
        "no guard on the defaults",
        "svg2_compile/recompilation.py",
        '    guard_attribute(defaults.__name__, "in_force", name)\n',
        "",
        RECOMPILATION,
    ),
    Mutant(
        "a guard on every default, given or not",
        "svg2_compile/options.py",
        "for name in FIELD_NAMES if name not in given",
        "for name in FIELD_NAMES",
        RECOMPILATION,
    ),
    Mutant(
        "a block of settings is entered once only",
        "svg2_compile/options.py",
        "if _defaults is not self._chosen:",
        "if False:",
        RECOMPILATION,
    ),
    Mutant(
        "no place is made for another setting",
        "svg2_compile/recompilation.py",
        "            each.code.forget()\n",
        "",
        RECOMPILATION,
    ),
    Mutant(
        "a place is made whoever's defaults change",
        "svg2_compile/recompilation.py",
        "for name, _ in graphs} & changed",
        "for name, _ in graphs}",
        RECOMPILATION,
    ),
    Mutant(
        "the limit that torch.compile was given is not seen",
        "svg2_compile/dynamo.py",
        'if name == "recompile_limit" and self._own_limit is not None:',
        "if False:",
        RECOMPILATION,
    ),
    Mutant(
        "running uncompiled is no error",
        "svg2_compile/recompilation.py",
        "    call_before_compiling(_before_compiling)\n",
        "",
        RECOMPILATION,
    ),
)
