"""The FX room: graph in, graph out. Knows ops and no model.

Only ``lowering="tensorrt"`` uses split_segments, join_slices, hold_attention, freeze_weights and restore_mutation.
"""

if __name__ != "svg2_compile.passes":
    raise ImportError(
        f"{__name__!r} is a source folder of svg2_compile, not a package of its own; you are probably in the "
        "repository root. Run Python with -P (or PYTHONSAFEPATH=1), or import svg2_compile.passes"
    )
