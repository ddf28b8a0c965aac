"""Adapters on two processes: the gradients are those of one process on the joined batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_gradients as worker
import image_classification
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from families import FAMILIES, WIDTH
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import hf_visual_peft
from hf_visual_peft.coverage.sizes import small_fields


CONFIGS = Path(image_classification.__file__).parent / "accelerate"
CARRIED = {torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The gradients that each of two processes ended up with."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0"
    done = subprocess.run(
        [sys.executable, *launch.split(), worker.__file__, str(folder)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=Path(worker.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert facts == [{"processes": 2, "type": "DistributedType.MULTI_CPU"}] * 2
    return SimpleNamespace(folder=folder, found=[load_file(folder / f"{rank}.safetensors") for rank in range(2)])


@pytest.mark.parametrize("kind", ["whole", "again", "accumulated", "sharded"])
@pytest.mark.parametrize("name", worker.ADAPTERS)
def test_gradients_are_those_of_the_joined_batch(name, kind, ranks):
    """Also over two micro-batches, the first without communication, and in shards; every trained parameter has one."""
    model = worker.build(name)
    worker.loss_of(model, worker.batch()).backward()
    expected = worker.gradients(model)
    assert expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(value.abs().max() > 1e-3 for value in expected.values())
    prefix = f"{name}/{kind}/"
    for found in ranks.found:
        mine = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", worker.ADAPTERS)
def test_an_adapter_saved_from_shards_is_whole(name, ranks):
    expected = worker.build(name)
    loaded = PeftModel.from_pretrained(FAMILIES["vit"].model(), ranks.folder / name).state_dict()
    assert loaded.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_one_process_alone_has_other_gradients():
    """The comparison can fail: half of the batch gives something else."""
    for name in worker.ADAPTERS:
        model = worker.build(name)
        whole = worker.batch()
        worker.loss_of(model, whole).backward()
        expected = worker.gradients(model)
        model.zero_grad()
        worker.loss_of(model, {key: value.chunk(2)[0] for key, value in whole.items()}).backward()
        found = worker.gradients(model)
        assert max((found[key] - value).abs().max() for key, value in expected.items()) > 1e-3


@pytest.mark.parametrize("name", hf_visual_peft.list_methods())
def test_every_buffer_can_be_broadcast(name):
    """DistributedDataParallel sends all buffers; neither gloo nor NCCL carries integers of 16 bits."""
    method = hf_visual_peft.get_method(name)
    fields = small_fields(method.config_cls, {}, WIDTH)
    model = get_peft_model(FAMILIES["vit"].model(), method.config_cls(**fields))
    assert {buffer.dtype for buffer in model.buffers()} <= CARRIED


@pytest.mark.parametrize(
    ("file", "kind", "processes"),
    [
        ("single_gpu", "NO", 1),
        ("ddp", "MULTI_GPU", 2),
        ("cpu", "MULTI_GPU", 2),
        ("fsdp2", "FSDP", 2),
        ("deepspeed_zero2", "DEEPSPEED", 2),
        ("deepspeed_zero3", "DEEPSPEED", 2),
    ],
)
def test_accelerate_reads_every_config(file, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"{file}.yaml"))
    assert (config.distributed_type, config.num_processes) == (DistributedType[kind], processes)
    assert f"`{file}.yaml`" in (CONFIGS / "README.md").read_text(encoding="utf-8")


def test_the_recipe_refuses_what_shards_do_not_allow():
    flags = {"checkpointing_steps": "no", "resume_from_checkpoint": None, "push_to_hub": False, "method": "ssf"}
    flags |= {"cache_features": None}

    def check(kind, **changed):
        args = SimpleNamespace(**flags | {"select": "best"} | changed)
        image_classification.check_sharded(SimpleNamespace(distributed_type=kind), args)

    check(DistributedType.FSDP)
    check(DistributedType.DEEPSPEED, select="last")
    check(DistributedType.MULTI_GPU, checkpointing_steps="epoch", push_to_hub=True)
    with pytest.raises(ValueError, match="FSDP does not go with --checkpointing_steps other than no, --push_to_hub"):
        check(DistributedType.FSDP, checkpointing_steps="epoch", push_to_hub=True)
    with pytest.raises(ValueError, match="DEEPSPEED does not go with --select other than last"):
        check(DistributedType.DEEPSPEED)
