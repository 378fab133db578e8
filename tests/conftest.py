"""Eight simulated CPU devices for every test, programs compiled quickly and kept between runs."""

import os
import shutil
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the gpu tier sets its own
# Tests compile much and compute little: this halves their time. A flag that XLA does not know ends the process, so only
# for the versions that are known to have them.
if version("jax").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )

import jax  # noqa: E402
import pytest  # noqa: E402

# Works only before the first use of a backend, so here.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "cache"):
        worker = getattr(config, "workerinput", {}).get("workerid", "")  # writes of another are not atomic
        kept = str(config.cache.mkdir(f"jax{worker}"))
    else:  # -p no:cacheprovider
        kept = tempfile.mkdtemp(prefix="jaxpo-tests-")
        config.add_cleanup(lambda: shutil.rmtree(kept, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", kept)
    os.environ["XDG_STATE_HOME"] = kept  # where the key is that signs runs: not the user's own
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
