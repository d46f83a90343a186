"""The version, where the package build and the manifest find it."""

__version__ = "0.1.0"
