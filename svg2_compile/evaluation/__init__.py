"""What sparsity costs in quality: generations beside dense ones, kept in a ledger, shown on a page."""
