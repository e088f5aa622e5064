"""Post-training of a model that shares: recipes, data, the loop, stages, the command line."""

import logging

# Where torchao is installed, transformers imports it, and it warns of kernels for other machines.
for _name in ("torchao", "torchao.kernel.intmm", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.ERROR)
