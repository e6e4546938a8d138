"""Eight devices on one CPU, for the tests of sharding. It has to be said before JAX starts its backend."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
