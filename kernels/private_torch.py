"""What the ops use of PyTorch's private names: the list to go through when torch changes.

``tests/test_private_torch.py`` asks for each by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import SymBool

check_value_of_torch: Callable[[bool | SymBool, Callable[[], str]], None] = torch._check_value
"""Raises ValueError; understands symbolic sizes. Read in torch 2.13.0, where it has no types."""

check_type_of_torch: Callable[[bool | SymBool, Callable[[], str]], None] = torch._check_type
"""Raises TypeError; the same otherwise. Read in torch 2.13.0."""

flash_attention_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Returns the output and the log-sum-exp: all of the CPU's attention. Read in torch 2.13.0."""
