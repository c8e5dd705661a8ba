"""Processes on other devices than that of the tests."""

import os


def on_cpus(count):
    """The environment of a process that sees so many devices; all else is as in the tests."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
