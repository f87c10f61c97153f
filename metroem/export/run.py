"""Field sets out again: as volumes for corgie and neuroglancer, or as files."""

from metroem import cli
from metroem.export.files import write_files
from metroem.export.overlaps import Overlaps
from metroem.export.requests import ExportRequest
from metroem.export.sections import find_exported
from metroem.export.volumes import write_volumes


def export_fields(request: ExportRequest) -> None:
    """Write the field sets of a data set in the format asked for.

    Displacements are whole: what a download took out of them is put back. An
    export that was killed goes on where it was, and one that is there is left.

    Raises:
        DatasetError: there are no such fields, two of them belong to one place of
            what is written, or that holds something else.
    """
    sets = find_exported(request)
    overlaps = Overlaps(request, sets)
    overlaps.check()
    if request.format == "cloudvolume":
        write_volumes(request, sets, overlaps, cli.command_line())
    else:
        write_files(request, sets)
