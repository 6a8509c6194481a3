"""The version of the distribution, which pyproject.toml states."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("asyncckpt")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
