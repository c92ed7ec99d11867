"""PyTorch's attention is called by position (`Note: [Calling PyTorch's attention]`): what it takes and gives here.

No device is needed: the torch at hand, which need not be the one that the library was built against, says what it has.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from attnrb.cli.about import about
from torch.nn.attention import SDPBackend, sdpa_kernel

OPERANDS = ["Tensor query", "Tensor key", "Tensor value"]
# Of each operation called through the dispatcher: arguments in order, results in order.
SCHEMAS = {
    "detach": (["Tensor self"], ["Tensor"]),
    "_fused_sdp_choice": (
        [*OPERANDS, "Tensor? attn_mask", "float dropout_p", "bool is_causal", "float? scale", "bool enable_gqa"],
        ["int"],
    ),
    "_scaled_dot_product_flash_attention_for_cpu": (
        [*OPERANDS, "float dropout_p", "bool is_causal", "Tensor? attn_mask", "float? scale"],
        ["Tensor", "Tensor"],
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        [
            "Tensor grad_out",
            *OPERANDS,
            "Tensor out",
            "Tensor logsumexp",
            "float dropout_p",
            "bool is_causal",
            "Tensor? attn_mask",
            "float? scale",
        ],
        ["Tensor", "Tensor", "Tensor"],
    ),
}


def spelled(kind: torch._C.JitType) -> str:
    text = str(kind)
    return f"{text[len('Optional[') : -1]}?" if text.startswith("Optional[") else text


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_those_that_the_calls_were_written_for(name: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    arguments, results = SCHEMAS[name]
    assert [f"{spelled(each.type)} {each.name}" for each in schema.arguments] == arguments
    assert [spelled(each.type) for each in schema.returns] == results


HANDLES, NUMBERS = "AtenTensorHandle* ret{}", "int64_t* ret{}"
SEVEN_TENSORS_TWO_NUMBERS = [(NUMBERS if i in (4, 5) else HANDLES).format(i) for i in range(9)]
TENSORS = [f"AtenTensorHandle {name}" for name in ("query", "key", "value")]
# Of each C function of libtorch_cuda: its parameters, results behind arguments.
FUNCTIONS = {
    "flash_attention": [
        *TENSORS,
        "double dropout_p",
        "int32_t is_causal",
        "int32_t return_debug_mask",
        "double* scale",
        *SEVEN_TENSORS_TWO_NUMBERS,
    ],
    "efficient_attention": [
        *TENSORS,
        "AtenTensorHandle* attn_bias",
        "int32_t compute_log_sumexp",
        "double dropout_p",
        "int32_t is_causal",
        "double* scale",
        *(HANDLES.format(i) for i in range(4)),
    ],
    "cudnn_attention": [
        *TENSORS,
        "AtenTensorHandle* attn_bias",
        "int32_t compute_log_sumexp",
        "double dropout_p",
        "int32_t is_causal",
        "int32_t return_debug_mask",
        "double* scale",
        *SEVEN_TENSORS_TWO_NUMBERS,
    ],
    "flash_attention_backward": [
        "AtenTensorHandle grad_out",
        *TENSORS,
        *(f"AtenTensorHandle {name}" for name in ("out", "logsumexp", "cum_seq_q", "cum_seq_k")),
        "int64_t max_q",
        "int64_t max_k",
        "double dropout_p",
        "int32_t is_causal",
        "AtenTensorHandle philox_seed",
        "AtenTensorHandle philox_offset",
        "double* scale",
        *(HANDLES.format(i) for i in range(3)),
    ],
}


@pytest.mark.parametrize("kernel", FUNCTIONS)
def test_functions_are_those_that_the_calls_were_written_for(kernel: str) -> None:
    header = Path(torch.__path__[0], "include/torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h")
    if not header.is_file():
        pytest.skip(f"this torch came without {header.name}")
    name = f"aoti_torch_cuda__scaled_dot_product_{kernel}"
    declared = re.search(rf"\b{name}\(([^)]*)\)", header.read_text(encoding="utf-8"))
    assert declared is not None, f"this torch has no {name}"
    assert declared[1].split(", ") == FUNCTIONS[kernel]


def test_kernels_have_the_numbers_of_torch() -> None:
    backend = torch.nn.attention.SDPBackend
    assert [int(each) for each in (backend.FLASH_ATTENTION, backend.EFFICIENT_ATTENTION, backend.CUDNN_ATTENTION)] == [
        1,
        2,
        3,
    ]


def test_info_says_whose_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert about()["cuda_prefill"] is None or torch.cuda.is_available()
    monkeypatch.setattr("attnrb.cli.about._cuda", lambda: "on: a device (8.0)")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        told = about()["cuda_prefill"]
    assert told.startswith("PyTorch's flash or memory-efficient kernel")
    assert "gradients by flash" in told
    with sdpa_kernel(SDPBackend.MATH):
        assert about()["cuda_prefill"].startswith("attnrb's own kernels")
