import sys

import pytest
import torch
from conftest import backbone_config, needs_bfloat16, run_python, small_model

from emoshare.configuration_emoshare import ARCHITECTURES
from emoshare.training.precision import set_precision_of_evaluation, training_dtype

CPU = torch.device("cpu")


@pytest.fixture
def device_that_can(request, monkeypatch):
    monkeypatch.setattr("emoshare.training.precision.can_train_in_bfloat16", lambda device: request.param)


@pytest.mark.parametrize(
    ("device_that_can", "requested", "launched", "expected"),
    [
        (True, "auto", "no", torch.bfloat16),
        (False, "auto", "no", torch.float32),
        (True, "auto", "bf16", torch.bfloat16),
        (True, "bf16", "no", torch.bfloat16),
        (True, "no", "no", torch.float32),
        (True, "no", "bf16", torch.float32),  # the flag overrides the launcher
        (False, "no", "bf16", torch.float32),
    ],
    indirect=["device_that_can"],
)
@pytest.mark.usefixtures("device_that_can")
def test_the_dtype_follows_flag_launcher_and_device(requested, launched, expected, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert training_dtype(requested, CPU) == expected


@pytest.mark.parametrize("device_that_can", [False], indirect=True)
@pytest.mark.parametrize(
    ("requested", "launched", "message"),
    [
        ("bf16", "no", r"^--mixed_precision bf16: this device \(cpu\) cannot train in bfloat16"),
        ("auto", "bf16", r"^accelerate launch --mixed_precision bf16: this device \(cpu\) cannot train in bfloat16"),
        ("auto", "fp16", "accelerate launch --mixed_precision fp16: heads train in float32 or bf16"),
    ],
)
@pytest.mark.usefixtures("device_that_can")
def test_a_request_that_cannot_be_met_is_an_error(requested, launched, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=message):
        training_dtype(requested, CPU)


@needs_bfloat16
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_can_train_in_bfloat16_does(architecture):
    """Every operator of a head, forward and backward."""
    model = small_model(architecture=architecture).train()
    features = torch.rand(2, 20, 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(frame_features=features, labels=torch.rand(2, 9)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_backbone_in_bfloat16_is_evaluated_in_it_where_the_cpu_has_instructions(has_instructions, monkeypatch):
    """AVX2 imitates bfloat16, seven times as slow as float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_instructions})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model = small_model(backbone_config=backbone_config())
    model.backbone.bfloat16()
    set_precision_of_evaluation(model)
    assert model.backbone.dtype == (torch.bfloat16 if has_instructions else torch.float32)
    assert not torch.backends.cudnn.allow_tf32
    set_precision_of_evaluation(small_model())  # without a backbone


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the variables are oneDNN's and ATen's on x86-64")
def test_a_cpu_with_avx2_alone_cannot(tmp_path):
    script = (
        "import torch; from emoshare.training.precision import can_train_in_bfloat16; "
        "print(can_train_in_bfloat16(torch.device('cpu')))"
    )
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert run_python("-c", script, cwd=tmp_path, **limits).stdout.strip() == "False"


@pytest.mark.slow
def test_a_refused_precision_ends_a_run_before_the_corpus_is_read(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "from emoshare.training.arguments import parse_arguments\n"
        "from emoshare.training.launch import start\n"
        "start(parse_arguments(['--output_dir', 'out', '--mixed_precision', 'bf16']))\n"
    )
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = run_python(script, cwd=tmp_path, check=False, **limits)
    assert result.returncode != 0
    assert "--mixed_precision bf16: this device (cpu) cannot train in bfloat16" in result.stderr
