"""Errors that a user can act on. Command lines print their message and exit with 1."""


class AllocMoeError(Exception):
    """Base of every error caused by input, not by a bug: one clear sentence and what to do."""


class ArtifactError(AllocMoeError):
    """An artifact is missing, incomplete, or of a format this version can't read."""


class DeviceError(AllocMoeError):
    """The execution provider that was asked for can't be used on this machine."""


class GenerationError(AllocMoeError):
    """A prompt, a text or a setting that the model can't work with."""
