"""What accelerators can do at most: matrix products in bfloat16, dense, by their makers.

Units:  FLOP/s, 2 a multiply-add.       Errors: none.
Source: NVIDIA's data sheets of A100, H100 SXM, H200 SXM and HGX B200 (for Hopper and Blackwell half of the figure with
sparsity). No card holds the clock these figures take: large products reach 70 to 85 % of them."""

from collections.abc import Mapping

BF16_PEAKS: Mapping[str, float] = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""By name."""
