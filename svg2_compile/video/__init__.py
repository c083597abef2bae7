"""Make videos with a pipeline, time them, compare them and picture them; the demo."""
