"""Settings for every test: few threads, no network, property tests that a slow machine does not fail."""

import os

# Before torch is imported, and inherited by the scripts that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile("flatlm", deadline=None, derandomize="CI" in os.environ, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flatlm")
