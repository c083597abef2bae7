"""The op room: tensors only. Knows no graphs and no models."""

if __name__ != "svg2_compile.kernels":
    raise ImportError(
        f"{__name__!r} is a source folder of svg2_compile, not a package of its own; you are probably in the "
        "repository root. Run Python with -P (or PYTHONSAFEPATH=1), or import svg2_compile.kernels"
    )
