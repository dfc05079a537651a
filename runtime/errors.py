"""Errors that a user can act on. Command lines print their message and exit with 1."""


class AllocMoeError(Exception):
    """Base of every error caused by input, not by a bug: one clear sentence and what to do."""


class ArtifactError(AllocMoeError):
    """An artifact is missing, incomplete, or of a format this version can't read."""
