"""Tiles for compute capability 9.0: H100, H200."""

from svg2_compile.kernels.tiles import AttentionTiles

ATTENTION = {
    # Timed on an H200 in an earlier form of the kernel (docs/lab, 4).
    ("pointer", 64): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
    # Likewise.
    ("pointer", 128): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=3),
    # Compiled without spills; timed on an H100 (docs/lab, 11).
    ("descriptor", 64): AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=8, num_stages=2),
    # Likewise.
    ("descriptor", 128): AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=8, num_stages=2),
}
# Compiled without spills, by Triton 3.6 and 3.9; not timed.
CANDIDATES = {
    ("pointer", 64): (
        AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=2),
        AttentionTiles(block_m=64, block_n=64, piece=16, num_warps=4, num_stages=3),
        AttentionTiles(block_m=128, block_n=32, piece=16, num_warps=8, num_stages=3),
    ),
    ("pointer", 128): (
        AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=2),
        AttentionTiles(block_m=64, block_n=64, piece=16, num_warps=4, num_stages=3),
        AttentionTiles(block_m=128, block_n=32, piece=16, num_warps=8, num_stages=3),
    ),
}
