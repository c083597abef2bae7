"""``svg2 calibrate``: budgets of layers and heads, measured on a model and written to a file."""
