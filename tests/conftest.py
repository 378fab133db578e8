"""Eight simulated CPU devices for every test; both settings work only before the first use of a backend."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the gpu tier sets its own

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
