"""The exceptions people meet; every message says what, expected, got, and what to do."""


class ConfigError(ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class UnsupportedError(RuntimeError):
    """An attention stays dense although ``on_unsupported="error"`` asked to be told."""


class InternalError(RuntimeError):
    """A bug of ours: names the pass and the node, and where the graph was written if ``SVG2_DEBUG_DIR`` is set."""
