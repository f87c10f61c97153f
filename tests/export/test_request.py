import dataclasses

from metroem.__main__ import build_parser
from metroem.export.requests import ExportRequest


def test_each_flag_is_a_field_of_the_request(tmp_path):
    args = build_parser().parse_args(
        ["export-fields", "--dataset_path", str(tmp_path), "--dst_path", "field"]
    )
    flags = {k: v for k, v in vars(args).items() if k not in ("command", "run")}
    assert set(flags) == {field.name for field in dataclasses.fields(ExportRequest)}
    # What is left out is what the request has by default.
    assert ExportRequest(**flags) == ExportRequest(tmp_path, "field")
