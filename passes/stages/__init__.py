"""The stages of a sparse attention, one a file; ``passes/plan.py`` has the list that says which of them a site has."""
