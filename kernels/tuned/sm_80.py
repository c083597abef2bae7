"""Tiles for compute capability 8.0: A100."""

from svg2_compile.kernels.tiles import AttentionTiles

ATTENTION = {
    # Compiled without spills; not timed on this generation.
    ("pointer", 64): AttentionTiles(block_m=128, block_n=32, piece=16, num_warps=8, num_stages=3),
    # Compiled without spills; not timed on this generation.
    ("pointer", 128): AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=3),
}
# Compiled without spills, by Triton 3.6 and 3.9; not timed.
CANDIDATES = {
    ("pointer", 64): (AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=3),),
    ("pointer", 128): (
        AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=8, num_stages=3),
        AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=4),
    ),
}
