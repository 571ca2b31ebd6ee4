"""One finetuning run: data, task, model, optimizer, training, its folder. Needs the extra `finetune`."""

import logging

# Of kernels that are missing here and not needed, they tell when something imports them, which transformers does.
for _library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
