"""What can go wrong with a kernel.

KernelError
  BuildError      the source does not compile, or the cache of compiled kernels cannot be used
  ContractError   an argument of a launch is not what the launcher's docstring says
  LaunchError     the driver refused a launch, or a kernel failed while it ran
  CheckError      a kernel's result is wrong (`python -m kernels check`)
"""

from __future__ import annotations


class KernelError(Exception):
    """Base of all errors of this package."""


class BuildError(KernelError):
    """A kernel cannot be compiled, or compiled kernels cannot be kept."""


class ContractError(KernelError, ValueError):
    """An argument breaks the contract of its launcher: names operation, tensor, what was expected and found."""


class LaunchError(KernelError):
    """A kernel could not be started or failed; the message ends with the last launches."""


class CheckError(KernelError):
    """An operation gave something else than its reference allows."""
