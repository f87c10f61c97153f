"""Test which device a run takes, and its messages if it cannot have that device."""

import json
import os
import socket

import pytest
import torch

import train
from metroem.errors import UsageError
from metroem.models.module_folders import init_pyramid
from metroem.training.requests import TrainRequest
from metroem.utils import distributed
from metroem.utils.distributed import choose_device
from tests.models.specs import scalenet, write_spec
from tests.pairs import write_pairs

RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Says how many GPUs there are; nothing of a run is in the environment."""
    for name in (*RANK, "MASTER_PORT", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)

    def has(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    has(0)
    return has


def launched(monkeypatch, rank, ranks):
    values = (rank, ranks, rank, ranks)
    for name, value in zip(RANK, values, strict=False):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("gpus", [[1], [0], [0, 1]])
def test_a_gpu_that_was_named_and_is_not_there_is_refused(device, gpus):
    with pytest.raises(UsageError, match="this machine has 0 GPUs"):
        choose_device(device, gpus)
    assert choose_device("cpu", gpus).type == "cpu"


def test_without_a_name_a_machine_without_a_gpu_goes_on():
    assert choose_device("auto", ()).type == "cpu"
    with pytest.raises(UsageError, match="this machine has 0 GPUs"):
        choose_device("cuda", ())


def test_one_of_several_that_is_not_there_is_refused_by_name(machine):
    machine(2)
    assert str(choose_device("auto", [1])) == "cuda:1"
    with pytest.raises(UsageError, match=r"--gpu 0,2: this machine has 2 GPUs"):
        choose_device("auto", [0, 2])


def test_numbers_of_gpus_are_those_of_nvidia_smi(machine, monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        "device_count",
        lambda: 1 if os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" else 0,
    )
    assert str(choose_device("auto", ())) == "cuda:0"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")  # asked for
    choose_device("cpu", ())
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


@pytest.mark.parametrize(("gpus", "device"), [([], "cuda:1"), ([3, 2], "cuda:2")])
def test_a_rank_takes_its_gpu(machine, monkeypatch, gpus, device):
    machine(4)
    launched(monkeypatch, 1, 2)
    assert str(choose_device("auto", gpus)) == device


def test_gpus_that_are_not_one_a_rank_are_refused(machine, monkeypatch):
    machine(4)
    launched(monkeypatch, 0, 2)
    with pytest.raises(UsageError, match="--gpu 0: names 1 GPUs, but 2 ranks run"):
        choose_device("auto", [0])


def test_a_device_is_set_also_for_one_process(monkeypatch):
    noted = []
    monkeypatch.setattr(torch.cuda, "set_device", noted.append)
    with distributed.process_group(torch.device("cuda", 3)):
        pass
    assert noted == [torch.device("cuda", 3)]


def test_a_scheduler_that_calls_a_lone_process_rank_0_of_1_leaves_the_ranks(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert TrainRequest(tmp_path, tmp_path, gpu="0,1").ranks_to_launch == 2
    with distributed.process_group(torch.device("cpu")):
        assert distributed.world_size() == 1 and not distributed.dist.is_initialized()
    launched(monkeypatch, 0, 1)  # by torchrun
    assert TrainRequest(tmp_path, tmp_path, gpu="0,1").ranks_to_launch == 0


def test_ranks_that_cannot_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT: start ranks"),
        distributed.process_group(torch.device("cpu")),
    ):
        pass


def test_a_port_that_is_taken_is_refused_in_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "pyramid" / "0_mip1in_x").mkdir(parents=True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f"--port {port}: cannot be used"):
            train.main(
                ["--pyramid_path", str(tmp_path / "pyramid"), "--device", "cpu"]
                + ["--dataset_path", str(tmp_path / "data"), "--gpu", "0,1"]
                + ["--port", str(port)]
            )


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_is_none_is_refused(tmp_path, port):
    with pytest.raises(UsageError, match="expected 1 to 65535"):
        TrainRequest(tmp_path, tmp_path, port=port)


def test_a_gpu_named_twice_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--gpu 1,1: names a GPU twice"):
        TrainRequest(tmp_path, tmp_path, gpu="1,1")


def test_the_device_the_threads_and_the_ranks_are_the_first_line_of_the_log(
    tmp_path, caplog
):
    write_pairs(tmp_path / "data", mips=(1,), num_pairs=6, shape=(48, 64))
    (module,) = init_pyramid(tmp_path / "pyramid", [1], "scalenet")
    write_spec(module / "model", scalenet(4, 6))
    phase = {"lr": 1e-4, "num_epochs": 1, "num_samples": 1, "smoothness": 1}
    (tmp_path / "s.json").write_text(json.dumps({"1": [phase]}))
    caplog.clear()
    train.main(
        ["--pyramid_path", str(tmp_path / "pyramid"), "--train_mode", "custom"]
        + ["--dataset_path", str(tmp_path / "data"), "--val_pairs", "0"]
        + ["--train_params_path", str(tmp_path / "s.json")]
        + ["--generate_field_stages", "0"]
    )
    threads = torch.get_num_threads()
    expected = f"device cpu, threads {threads} a rank, ranks 1"
    assert caplog.messages[0] == expected
    log = (tmp_path / "pyramid" / "checkpoint.log").read_text().splitlines()
    assert log[0].endswith(expected)
