"""Recipes and programs around the optimizer; they need the extras `demo` or `lab`."""

import logging

# Of kernels that are missing here and not needed, they tell when something imports them, which transformers does.
for _library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
