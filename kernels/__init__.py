"""Fused Triton kernels, each beside a plain PyTorch reference. Nothing here imports Triton before a kernel runs.

`kernels` is also the import name of a distribution of Hugging Face, from which transformers takes names where it is
installed. The folder of this project then stands in its way, and whoever asks for such a name is told so.
"""

import importlib.metadata


def __getattr__(name: str):
    if not name.startswith("__") and _hugging_face_is_installed():
        raise ImportError(
            f"transformers asks the distribution `kernels` of Hugging Face for {name}, but finds this project's folder "
            "of the same name: `pip uninstall kernels`, nothing here needs it"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _hugging_face_is_installed() -> bool:
    try:
        return bool(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        return False
