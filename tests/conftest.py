"""What all tests share: a HOME of their own.

modelhouse, cloud-volume and corgie write below HOME, modelhouse already when
it is imported.
"""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="metroem-tests-")
os.environ["HOME"] = _HOME.name
