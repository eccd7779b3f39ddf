"""One torch thread a test process: two of them share a small machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
