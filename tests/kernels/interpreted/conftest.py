"""These run in a process of their own: Triton reads TRITON_INTERPRET when a kernel is decorated."""

from kernels.tpa.dispatch import HAS_TRITON, INTERPRETED

collect_ignore_glob = [] if HAS_TRITON and INTERPRETED else ["test_*.py"]
