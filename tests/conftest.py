"""What holds for every test: one thread, as sums then have one order, and no log lines about tiny odd configs."""

import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
