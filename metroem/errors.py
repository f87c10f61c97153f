"""The errors that MetroEM raises for people.

    MetroEMError (ValueError)
      UsageError        flags or arguments that cannot work
      PyramidError      a pyramid or module directory that cannot be used
      DatasetError      an image set, field set or volume that cannot be used
      FieldError        a displacement field of the wrong form
      CheckpointError   weights or a training state that cannot be used

A message names the path or flag, says what was found and what was expected,
and what to do. `metroem.cli.run` prints it and exits with 1; any other
exception is a bug and keeps its traceback.
"""


class MetroEMError(ValueError):
    """Something that the user can put right."""


class UsageError(MetroEMError):
    """Flags or arguments that cannot work."""


class PyramidError(MetroEMError):
    """A pyramid or module directory that cannot be used."""


class DatasetError(MetroEMError):
    """An image set, field set or volume that cannot be used."""


class FieldError(MetroEMError):
    """A displacement field of the wrong form."""


class CheckpointError(MetroEMError):
    """Weights or a training state that cannot be used."""
