"""Every public shape is checked while the tests run: jaxtyping annotations through beartype, free at run time."""

import torch
from jaxtyping import install_import_hook

install_import_hook(["lightning_modules", "datamodules"], "beartype.beartype").__enter__()
torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings
