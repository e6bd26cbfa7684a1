"""Every test runs on the CPU; a TPU compiler that is installed must not look for a TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Threads of an interpreted kernel wait for one another in callbacks, each of which holds a thread of
# XLA's pool; that pool has as many as there are cores.
os.environ.setdefault("NPROC", "16")
