"""Tiles for compute capability 12.0: RTX 5090, RTX PRO 6000."""

from svg2_compile.kernels.tiles import AttentionTiles

ATTENTION = {
    # Compiled without spills; not timed on this generation.
    ("pointer", 64): AttentionTiles(block_m=128, block_n=32, piece=16, num_warps=8, num_stages=3),
    # Compiled without spills; not timed on this generation.
    ("pointer", 128): AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=3),
    # Compiled without spills; not timed on this generation.
    ("descriptor", 64): AttentionTiles(block_m=128, block_n=64, piece=16, num_warps=8, num_stages=2),
    # Likewise. Tiles of 128 keys, two in flight, take 128 KiB of shared memory, and there are 99.
    ("descriptor", 128): AttentionTiles(block_m=64, block_n=64, piece=16, num_warps=8, num_stages=2),
}
# Compiled without spills, by Triton 3.6 and 3.9; not timed.
CANDIDATES = {
    ("pointer", 64): (AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=4, num_stages=3),),
    ("pointer", 128): (
        AttentionTiles(block_m=64, block_n=64, piece=16, num_warps=8, num_stages=2),
        AttentionTiles(block_m=64, block_n=32, piece=16, num_warps=8, num_stages=3),
    ),
}
